"""What transactional sinks share: memory while a lane can't be loaded."""

from __future__ import annotations

import tracemalloc

import pytest

from datapipe.errors import LaneBlocked
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Table
from datapipe.sinks.memory import MemoryDatabase

INSTALL = Table("install", (Column("user_id", "bigint"),))


async def test_a_lane_that_stays_blocked_costs_the_same_memory_at_each_try() -> None:
    database = MemoryDatabase()
    database.checks["install"] = lambda line: False
    segments = [Segment("install", INSTALL.columns, b"7\n", 1) for _ in range(500)]
    async with database.open(Settings(), "one") as sink:

        async def tries(count: int) -> int:
            for _ in range(count):
                with pytest.raises(LaneBlocked):
                    await sink.load(INSTALL, segments)
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await tries(5)
            assert await tries(100) - before < 200_000  # bytes
        finally:
            tracemalloc.stop()
        del database.checks["install"]
        assert (await sink.load(INSTALL, segments)).loaded == 500
