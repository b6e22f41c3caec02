"""A database in memory, shared by the sinks of several processes; it can go away and come back.

database = MemoryDatabase()
create_app(settings, open_sink=database.open)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.segment import Segment
from datapipe.settings import Settings
from datapipe.sinks import Beat, Check, Heartbeat, Loaded, Selection, SinkState, Table


class MemoryDatabase:
    """Attributes: rows: COPY lines by lane. ledger: ids of segments. blocked: lanes that refuse.

    up, loading: whether it answers at all, and whether it answers loads.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[bytes]] = {}
        self.ledger: set[str] = set()
        self.beats: dict[str, Beat] = {}
        self.blocked: set[str] = set()
        self.up = True
        self.loading = True

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[MemorySink]:
        yield MemorySink(self, process)


class MemorySink:
    """What one process sees of it; idempotency keys are not looked at."""

    def __init__(self, database: MemoryDatabase, process: str) -> None:
        self._database = database
        self._process = process

    def _reach(self) -> MemoryDatabase:
        if not self._database.up:
            raise SinkUnavailable("the database is away")
        return self._database

    async def load(
        self, table: Table, segments: Sequence[Segment], *, accept_dead: bool = False
    ) -> Loaded:
        database, result = self._reach(), Loaded()
        if not database.loading:
            raise SinkUnavailable("the database takes no load")
        if table.name in database.blocked:
            raise LaneBlocked(f"{table.name} takes nothing")
        for segment in segments:
            if segment.id in database.ledger:
                result.duplicate += segment.events
                continue
            database.ledger.add(segment.id)
            database.rows.setdefault(table.name, []).extend(segment.data.splitlines(True))
            result.loaded += segment.events
        return result

    async def prepare(self, table: Table) -> None:
        self._reach()

    async def keep_house(self, beat: Heartbeat, removed: Sequence[str]) -> dict[str, Beat]:
        beats = self._reach().beats
        last = beats.get(self._process, Beat(0, False))
        beats[self._process] = Beat(last.count + 1, beat.ended)
        return dict(beats)

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return self._reach().ledger & set(segments)

    async def forget_source(self, source: str, process: str) -> None:
        self._reach()

    async def dead(self, selection: Selection, limit: int) -> dict[str, Any]:
        return {"total": 0, "groups": [], "letters": []}

    async def replay(
        self, selection: Selection, tables: Mapping[str, Table], check: Check
    ) -> tuple[dict[str, int], int]:
        return {}, 0

    async def drop(self, selection: Selection) -> int:
        return 0

    def abort(self) -> None:
        return

    def state(self) -> SinkState:
        up = self._database.up
        return SinkState(up, None if up else "away", "memory", "public")

    async def hint(self) -> str:
        return ""

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        return []
