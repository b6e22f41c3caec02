"""More comes than is loaded: what had to be parked is loaded as fast as it goes, and read ahead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from datapipe.app import PIPELINE, create_app
from datapipe.events.segment import Segment
from datapipe.pipeline.lane import Lane
from datapipe.settings import Settings
from datapipe.sinks import Loaded, Sink, Table
from tests.doubles.memory_database import MemoryDatabase

BATCH = json.dumps(
    [{"event_name": "install", "user_id": 1, "timestamp": n} for n in range(1000)]
).encode()
BATCHES = 40  # some 2 MiB of rows


async def test_a_backlog_is_loaded_at_once_and_read_ahead(
    aiohttp_client: Callable[..., Awaitable[Any]], tmp_path: Path
) -> None:
    database = MemoryDatabase()
    settings = Settings(
        data_dir=str(tmp_path), database_url="postgresql://", mirror="journal", host="127.0.0.1",
        buffer_max_bytes=524_288, load_trigger_bytes=131_072,
        load_interval=1000, load_min_interval=1000,
    )  # fmt: skip
    app = create_app(settings, open_sink=database.open)
    client = await aiohttp_client(app)
    lane = app[PIPELINE].buffer.lane("install")
    held = Held(lane)
    app[PIPELINE].loader.sink.load = held.load_of(app[PIPELINE].loader.sink)  # type: ignore[method-assign]

    for _ in range(BATCHES):
        answer = await client.post("/", data=BATCH)
        assert answer.status == 200
    assert lane.waiting.parked > 0

    held.open = True
    await until(lambda: lane.loaded == BATCHES * 1000, "the backlog is loaded")
    assert held.behind_parked >= 5
    assert lane.balanced


async def until(holds: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Look at every turn of the loop. Raises: TimeoutError: it did not come true."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.001)
    assert holds(), what


class Held:
    """A sink's `load` that waits, until `open`, and then until what comes next is in memory."""

    def __init__(self, lane: Lane) -> None:
        self.open = False
        self.behind_parked = 0
        self._lane = lane

    def load_of(self, sink: Sink) -> Callable[..., Awaitable[Loaded]]:
        load = sink.load

        async def held(table: Table, segments: Sequence[Segment], **options: Any) -> Loaded:
            await until(lambda: self.open, "the sink is open", 60)
            waiting, in_hand = self._lane.waiting, sum(segment.events for segment in segments)
            if waiting.parked:
                self.behind_parked += 1
                await until(
                    lambda: waiting.in_memory > in_hand,
                    "the next segments are read while these are loaded",
                )
            return await load(table, segments, **options)

        return held
