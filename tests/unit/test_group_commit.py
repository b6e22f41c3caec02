"""Group commit: chunks of many POSTs become segments that are full, whole and complete, at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Chunk, seal
from datapipe.events.types import Column
from datapipe.mirrors import Appended, Traits
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.memory import MemoryStore
from datapipe.pipeline.group_commit import GroupCommit
from datapipe.settings import Settings

COLUMNS = (Column("a", "text"),)


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    made = []
    for number in range(draw(st.integers(1, 12))):
        rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
        data = b"".join(b"x" * (size - 1) + b"\n" for size in rows)
        claim = ("c", "b", number) if draw(st.booleans()) else None
        made.append(Chunk(draw(st.sampled_from("pq")), COLUMNS, data, len(rows), claim))
    return made


@given(chunks(), st.integers(1, 200))
def test_segments_hold_all_rows_within_bounds(given_chunks: list[Chunk], max_bytes: int) -> None:
    segments = seal(given_chunks, max_bytes)
    for lane in "pq":
        wanted = b"".join(chunk.data for chunk in given_chunks if chunk.lane == lane)
        assert b"".join(s.data for s in segments if s.lane == lane) == wanted
    for segment in segments:
        assert segment.events == segment.data.count(b"\n") > 0
        whole = [segment.data[part.start : part.end] for part in segment.parts]
        single = segment.events == 1 or whole == [segment.data]
        assert len(segment.data) <= max_bytes or single
    parts = [(s.lane, p.number, s.data[p.start : p.end]) for s in segments for p in s.parts]
    keyed = [(c.lane, c.claim[2], c.data) for c in given_chunks if c.claim]
    assert sorted(parts) == sorted(keyed)


def test_rows_are_cut_so_that_segments_are_full() -> None:
    posts = [Chunk("p", COLUMNS, b"123456789\n" * 60, 60) for _ in range(10)]
    assert [len(segment.data) for segment in seal(posts, 1000)] == [1000] * 6


@pytest.mark.parametrize("turns", range(16))
async def test_a_request_is_appended_whenever_it_comes(turns: int) -> None:
    """Also in the very turn of the loop in which the task before has ended."""
    settings = Settings(mirror="none")
    mirror = BufferedMirror(MemoryStore(settings), settings.buffer_max_bytes)
    booked: list[int] = []

    def book(appended: Appended, began: float) -> None:
        booked.append(len(appended.stored))

    group = GroupCommit(mirror, book, linger_s=0.0, timeout_s=5.0)
    async with asyncio.timeout(10):
        for _ in range(50):
            await group.add([Chunk("p", COLUMNS, b"1\n", 1)])
            for _ in range(turns):
                await asyncio.sleep(0)
    assert booked == [1] * 50


async def test_an_append_that_fails_for_a_reason_of_ours_tells_each_request() -> None:
    class Broken:
        traits = Traits(batch_bytes=1000, identity="", recover_interval_s=1.0)

        async def append(self, segments: Any) -> Appended:
            raise RuntimeError("not foreseen")

    mirror: Any = Broken()
    group = GroupCommit(mirror, lambda appended, began: None, linger_s=0.0, timeout_s=5.0)
    for _ in range(2):  # and it goes on
        with pytest.raises(RuntimeError, match="not foreseen"):
            await group.add([Chunk("p", COLUMNS, b"1\n", 1)])


async def test_a_task_that_starts_as_all_is_refused_holds_up_nothing_after_it() -> None:
    """An append that hangs is given up between a request and the start of its task."""
    settings = Settings(mirror="none")
    mirror = BufferedMirror(MemoryStore(settings), settings.buffer_max_bytes)
    group = GroupCommit(mirror, lambda appended, began: None, linger_s=0.0, timeout_s=5.0)
    chunk = Chunk("p", COLUMNS, b"1\n", 1)
    refused = group.add([chunk])
    group._give_up([])
    with pytest.raises(MirrorUnavailable):
        await refused
    group._hung -= 1  # it has ended
    await asyncio.sleep(0)
    await asyncio.wait_for(group.add([chunk]), 5)
