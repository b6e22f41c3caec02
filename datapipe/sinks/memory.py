"""`datapipe.testing`, and the tests here: a database in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from datapipe.events.segment import Segment
from datapipe.settings import Settings
from datapipe.sinks import Beat, Check, Heartbeat, Loaded, Selection, SinkState, Table


class MemorySink:
    """A database in memory, as far as accepted events go: it refuses no row.

    Attributes: lines: COPY lines by lane. ledger: ids of segments; idempotency keys are not kept.
    """

    def __init__(self) -> None:
        self.lines: dict[str, list[bytes]] = {}
        self.ledger: set[str] = set()

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[MemorySink]:
        yield self

    async def load(
        self, table: Table, segments: Sequence[Segment], *, accept_dead: bool = False
    ) -> Loaded:
        result = Loaded()
        for segment in segments:
            if segment.id in self.ledger:
                result.duplicate += segment.events
                continue
            self.ledger.add(segment.id)
            self.lines.setdefault(table.name, []).extend(segment.data.splitlines(True))
            result.loaded += segment.events
        return result

    async def waits(self) -> dict[str, str]:
        return {}

    async def prepare(self, table: Table) -> None:
        return

    async def keep_house(self, beat: Heartbeat, removed: Sequence[str]) -> dict[str, Beat]:
        return {}

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return self.ledger & set(segments)

    async def forget_source(self, source: str, process: str) -> None:
        return

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
        return SinkState(True, None, "memory", "public")

    async def hint(self) -> str:
        return ""

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        return []
