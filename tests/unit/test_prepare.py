"""`make run` makes tables at the start; one that can't be made holds up nobody."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from datapipe.app import PIPELINE, create_app, create_runner
from datapipe.errors import SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import Table
from datapipe.sinks.memory import MemoryDatabase, MemorySink
from tests.doubles.virtual_time import VirtualTime

HOUR_S = 3600


class _Locked(MemorySink):
    """The table `crash_report` is locked; `everywhere`: the whole database is away."""

    def __init__(self, asked: Counter[str], everywhere: bool) -> None:
        super().__init__(MemoryDatabase(), "one")
        self._asked = asked
        self._everywhere = everywhere

    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        self._asked[table.name] += 1
        if table.name == "crash_report" or self._everywhere:
            raise SinkUnavailable("lock timeout", everywhere=self._everywhere)
        return []


@pytest.mark.parametrize("everywhere", [False, True])
def test_how_often_tables_are_asked_for(everywhere: bool) -> None:
    """A wait for a lock holds up all who come to the table behind us: so it is tried rarely."""
    asked: Counter[str] = Counter()

    @asynccontextmanager
    async def opened(settings: Settings, process: str) -> AsyncIterator[MemorySink]:
        yield _Locked(asked, everywhere)

    async def main() -> None:
        app = create_app(Settings(mirror="none"), open_sink=opened)
        app[PIPELINE].try_out = True
        runner = create_runner(app)
        await runner.setup()
        await asyncio.sleep(10)
        early = asked.copy()
        await asyncio.sleep(HOUR_S)
        await runner.cleanup()
        if everywhere:
            assert asked.total() > HOUR_S / 5
        else:
            assert early["install"] == early["purchase"] == asked["install"] == 1
            assert asked["crash_report"] < HOUR_S / 10

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(main())


def test_otherwise_none_is_touched_before_its_first_load() -> None:
    asked: Counter[str] = Counter()

    @asynccontextmanager
    async def opened(settings: Settings, process: str) -> AsyncIterator[MemorySink]:
        yield _Locked(asked, everywhere=False)

    async def main() -> None:
        runner = create_runner(create_app(Settings(mirror="none"), open_sink=opened))
        await runner.setup()
        await asyncio.sleep(HOUR_S)
        await runner.cleanup()

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(main())
    assert not asked
