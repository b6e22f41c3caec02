"""A database in memory, shared by the sinks of several processes; it can go away and come back.

database = MemoryDatabase()
create_app(settings, open_sink=database.open)
"""

from __future__ import annotations

from collections.abc import Sequence

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.sinks import Beat, Heartbeat, Loaded, SinkState, Table
from datapipe.sinks.memory import MemorySink


class MemoryDatabase(MemorySink):
    """Attributes: blocked: lanes that refuse. up, loading: whether it answers at all, and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.beats: dict[str, Beat] = {}
        self.blocked: set[str] = set()
        self.up = True
        self.loading = True

    def _reach(self) -> None:
        if not self.up:
            raise SinkUnavailable("the database is away")

    async def load(
        self, table: Table, segments: Sequence[Segment], *, accept_dead: bool = False
    ) -> Loaded:
        self._reach()
        if not self.loading:
            raise SinkUnavailable("the database takes no load")
        if table.name in self.blocked:
            raise LaneBlocked(f"{table.name} takes nothing")
        return await super().load(table, segments, accept_dead=accept_dead)

    async def prepare(self, table: Table) -> None:
        self._reach()

    async def keep_house(self, beat: Heartbeat, removed: Sequence[str]) -> dict[str, Beat]:
        self._reach()
        last = self.beats.get(beat.process, Beat(0, False))
        self.beats[beat.process] = Beat(last.count + 1, beat.ended)
        return dict(self.beats)

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        self._reach()
        return await super().loaded(segments)

    async def forget_source(self, source: str, process: str) -> None:
        self._reach()

    def state(self) -> SinkState:
        return SinkState(self.up, None if self.up else "away", "memory", "public")
