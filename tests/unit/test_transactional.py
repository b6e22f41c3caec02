"""What transactional sinks share: memory while a lane can't be loaded, answers that are lost."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import pytest

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Table
from datapipe.sinks.memory import MemoryDatabase, MemorySink
from datapipe.sinks.transaction import Transaction

_T = TypeVar("_T")
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


class LosesAnswers(MemorySink):
    """Commits, and so many times says that it does not know."""

    lost = 2

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        result = await super().transact(lane, work)
        if self.lost:
            self.lost -= 1
            raise SinkUnavailable("the connection was lost")
        return result


async def test_a_commit_whose_answer_was_lost_counts_as_what_it_did() -> None:
    database = MemoryDatabase()
    sink = LosesAnswers(database, "one")
    database.checks["install"] = lambda line: line != b"8\n"
    segments = [Segment("install", INSTALL.columns, row, 1) for row in [b"7\n"] * 3 + [b"8\n"]]
    for _ in range(2):
        with pytest.raises(SinkUnavailable):
            await sink.load(INSTALL, segments)
    loaded = await sink.load(INSTALL, segments)
    assert (loaded.loaded, loaded.duplicate, loaded.dead) == (3, 0, 1)
    assert loaded.dead_of == {segments[-1].id: 1}
    assert len(database.lines["install"]) == 3
    loaded = await sink.load(INSTALL, segments)  # this one is somebody's copy
    assert (loaded.loaded, loaded.duplicate, loaded.dead) == (0, 4, 0)
    assert loaded.dead_of == {segments[-1].id: 1}  # whoever loaded it
