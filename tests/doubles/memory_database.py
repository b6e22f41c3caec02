"""A database in memory, shared by the sinks of several processes; it can go away and come back.

database = MemoryDatabase()
create_app(settings, open_sink=database.open)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import TypeVar

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import Beat, Heartbeat, Mark, SinkState, Table, memory
from datapipe.sinks.transaction import Entry, Transaction

_T = TypeVar("_T")


class MemoryDatabase(memory.MemoryDatabase):
    """Attributes: blocked: lanes that refuse. up, loading: whether it answers at all, and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked: set[str] = set()
        self.up = True
        self.loading = True

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[memory.MemorySink]:
        yield _Sink(self, process)

    def knows(self, segment: str) -> None:
        """From now on: another process has loaded it."""
        memory.MemoryTransaction(self, "another", ExitStack()).enter("segment", [Entry(segment)])

    def reach(self) -> None:
        """Raises: SinkUnavailable: it is away."""
        if not self.up:
            raise SinkUnavailable("the database is away")


class _Sink(memory.MemorySink):
    _database: MemoryDatabase

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        self._database.reach()
        if not self._database.loading:
            raise SinkUnavailable("the database takes no load")
        if lane in self._database.blocked:
            raise LaneBlocked(f"{lane} takes nothing")
        return await super().transact(lane, work)

    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        self._database.reach()
        return []

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        self._database.reach()
        return await super().heartbeat(beat)

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        self._database.reach()
        return await super().loaded(segments)

    async def expire(self, removed: Sequence[str]) -> None:
        self._database.reach()
        await super().expire(removed)

    async def expire_source(self, source: str, process: str) -> None:
        self._database.reach()
        await super().expire_source(source, process)

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        self._database.reach()
        await super().expire_lanes(source, before)

    async def now(self) -> float:
        self._database.reach()
        return await super().now()

    async def find_mark(self, prefix: str) -> Mark | None:
        self._database.reach()
        return await super().find_mark(prefix)

    async def mark(self, prefix: str) -> Mark:
        self._database.reach()
        return await super().mark(prefix)

    async def confirm_mark(self, prefix: str, id: str) -> None:
        self._database.reach()
        await super().confirm_mark(prefix, id)

    def state(self) -> SinkState:
        up = self._database.up
        return SinkState(up, None if up else "away", "memory", "public")
