"""What processes tell each other by their heartbeats, and which of them are taken to live."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from datapipe.app import PIPELINE, create_app, create_runner
from datapipe.mirrors import Mirror
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.memory import MemoryStore
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.coordinator import BEAT_S, SILENT_S, Coordinator
from datapipe.settings import Settings
from datapipe.sinks import Beat, Heartbeat
from datapipe.sinks.memory import MemoryDatabase, MemorySink
from tests.doubles.virtual_time import VirtualTime


class _Listening(MemorySink):
    """Keeps the last heartbeat."""

    heard: Heartbeat

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        self.heard = beat
        return await super().heartbeat(beat)


class Process:
    """One process with a database in memory, and the heartbeats of others there."""

    def __init__(self, group: str = "") -> None:
        self._group = group
        self._database = MemoryDatabase()
        self.sink = _Listening(self._database, "one")
        self.coordinator: Coordinator

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        @asynccontextmanager
        async def opened(settings: Settings, process: str) -> AsyncIterator[MemorySink]:
            yield self.sink

        @asynccontextmanager
        async def grouped(settings: Settings, process: str) -> AsyncIterator[Mirror]:
            store = MemoryStore(settings)
            store.traits = replace(store.traits, group=self._group)
            yield BufferedMirror(store, settings.buffer_max_bytes)

        app = create_app(Settings(mirror="none"), open_mirror=grouped, open_sink=opened)
        runner = create_runner(app)
        await runner.setup()
        self.coordinator = app[PIPELINE].coordinator
        yield
        await runner.cleanup()

    async def beats_of(self, seconds: float, *beats: Heartbeat) -> dict[str, str]:
        """Who lives, once others have sent these for so long."""
        others = MemorySink(self._database, "others")
        for _ in range(math.ceil(seconds / BEAT_S)):
            for beat in beats:
                await others.heartbeat(beat)
            await asyncio.sleep(BEAT_S)
        return self.coordinator.living


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(main)


def test_those_live_that_share_a_mirror_and_are_heard_of() -> None:
    async def main() -> None:
        process = Process("nats:datapipe")
        others = Heartbeat("others", "others", None, host="a:1", group="nats:another")
        shares = Heartbeat("shares", "shares", None, host="b:2", group="nats:datapipe")
        journals = Heartbeat("journals", "journal1", None, host="c:3")
        ended = Heartbeat("ended", "ended", None, ended=True, host="d:4", group="nats:datapipe")
        async with process.running():
            assert await process.beats_of(3 * BEAT_S, shares, others, journals, ended) == {
                "shares": "b:2"
            }
            assert await process.beats_of(SILENT_S - 2 * BEAT_S) == {"shares": "b:2"}
            assert await process.beats_of(4 * BEAT_S) == {}
            assert await process.beats_of(2 * BEAT_S, shares) == {"shares": "b:2"}

    run(main())


@pytest.mark.parametrize(
    ("oldest", "told"),
    [(None, None), (100.0, 60.0), (200.0, 0.0), (0.0, 160.0), (-math.inf, math.inf)],
)
def test_a_heartbeat_says_how_old_and_where(
    monkeypatch: pytest.MonkeyPatch, oldest: float | None, told: float | None
) -> None:
    monkeypatch.setattr(Buffer, "oldest", oldest)

    async def main() -> None:
        process = Process()
        async with process.running():
            await asyncio.sleep(BEAT_S)
            with monkeypatch.context() as fixed:
                fixed.setattr(time, "time", lambda: 160.0)
                await process.coordinator.heartbeat()
            heard = process.sink.heard
            assert heard.oldest_s == told
            assert heard.host == f"{socket.gethostname()}:{os.getpid()}"
            assert not heard.group

    run(main())
