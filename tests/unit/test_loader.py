"""A few workers for all lanes: those that fail share one of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datapipe.errors import SinkUnavailable
from datapipe.events.registry import load_registry
from datapipe.events.segment import Chunk, Segment
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.memory import MemoryStore
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Records
from datapipe.settings import Settings
from datapipe.sinks import Loaded, Table

FIELDS = {"n": "int"}
FAIL = ("one", "two", "three")


class Sink:
    """Loads of lanes in `FAIL` take their time and fail."""

    def __init__(self) -> None:
        self.under_way: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.most = 0  # of such loads at once, once each of those lanes has failed

    async def load(
        self,
        table: Table,
        segments: Sequence[Segment],
        *,
        accept_dead: bool = False,
        not_after: float | None = None,
    ) -> Loaded:
        if table.name not in FAIL:
            return Loaded(sum(segment.events for segment in segments))
        self.under_way[table.name] += 1
        if len(self.failed) == len(FAIL):
            self.most = max(self.most, self.under_way.total())
        await asyncio.sleep(0.05)
        self.under_way[table.name] -= 1
        self.failed[table.name] += 1
        raise SinkUnavailable("a lock", everywhere=False)

    def abort(self) -> None:
        return


async def test_lanes_that_fail_share_one_worker() -> None:
    settings = Settings(
        mirror="none", load_interval=0.001, load_min_interval=0, load_workers=3,
        events=dict.fromkeys((*FAIL, "good"), FIELDS),
    )  # fmt: skip
    registry = load_registry(settings)
    died: list[BaseException] = []
    mirror = BufferedMirror(MemoryStore(settings), settings.buffer_max_bytes)
    buffer = Buffer(mirror, settings, lambda seconds: None, died.append)
    sink: Any = Sink()
    loader = Loader(buffer, sink, registry, settings, Records(), lambda seconds: None)
    columns = registry.types["good"].columns

    async def post(*names: str) -> None:
        await buffer.append([Chunk(name, columns, b"1\t2\n", 1) for name in names])

    async with loader.running(died.append), asyncio.timeout(30):
        await post(*FAIL, "good")
        while min(sink.failed[name] for name in FAIL) < 3 or buffer.lane("good").loaded < 20:
            await post("good")
            await asyncio.sleep(0.01)
    assert sink.most == 1
    assert not died
