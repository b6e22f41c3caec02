"""How long clients are asked to wait while the mirror is full."""

from __future__ import annotations

import time

import pytest

from datapipe.errors import MirrorFull
from datapipe.events.segment import Chunk, seal
from datapipe.mirrors import Appended
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.memory import MemoryStore
from datapipe.pipeline.buffer import Buffer
from datapipe.settings import Settings


def full_since(buffer: Buffer, seconds: float) -> float:
    """What a POST is told that finds no room, so long after the first one."""
    error = MirrorFull("full")
    buffer._book(Appended((), error), time.perf_counter())
    assert buffer._full_since is not None
    buffer._full_since -= seconds
    buffer._book(Appended((), error), time.perf_counter())
    return error.retry_after_s


@pytest.mark.parametrize(("seconds", "wait_s"), [(0, 1), (5, 5), (3600, 30)])
def test_as_long_again_as_it_has_been_full(seconds: float, wait_s: float) -> None:
    settings = Settings(mirror="none")
    mirror = BufferedMirror(MemoryStore(settings), settings.buffer_max_bytes)
    buffer = Buffer(mirror, settings, lambda seconds: None, lambda error: None)
    assert full_since(buffer, seconds) == pytest.approx(wait_s, abs=0.5)
    stored = seal([Chunk("install", (), b"1\n", 1)], 100)
    buffer._book(Appended(stored), time.perf_counter())
    assert full_since(buffer, 0) == pytest.approx(1, abs=0.5)
