"""Dead letters and unknown events in SQL: see `sinks.Shelves`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from datapipe.settings import Settings
from datapipe.sinks import UNKNOWN_GROUPS, Selection, Shelf, Table
from datapipe.sinks.dialect import OWN_TABLES, UNKNOWN_TABLE, Dialect
from datapipe.sinks.letters import found, found_unknown
from datapipe.sinks.sql_tables import SqlTables

_DELETED_AT_ONCE = 1000  # rows of a shelf, so that each statement is soon done
_NAMES_AT_ONCE = 100  # SQLite takes 500 SELECTs in one

log = structlog.stdlib.get_logger("datapipe.sinks")


class SqlShelves(SqlTables):
    """Finds, counts and removes what waits for a person."""

    def __init__(self, dialect: Dialect, settings: Settings, process: str) -> None:
        super().__init__(dialect, settings, process)
        self._removed = 0  # unknown events, since none were left that are too old

    async def find(self, selection: Selection, limit: int) -> dict[str, Any]:
        """See `Shelves.find`."""
        if selection.shelf is Shelf.UNKNOWN:
            return await self._find_unknown(selection, limit)
        await self.prepare(OWN_TABLES[0])
        condition, values = self._dialect.where(selection)
        state = self._dialect.quote("sqlstate")  # a reserved word of MySQL
        groups = await self.query(
            f"SELECT lane, {state}, min(message), count(*) FROM {self._letters}"
            f" WHERE {condition} GROUP BY lane, {state} ORDER BY count(*) DESC, lane, {state}",
            *values,
        )
        written = self._dialect.epoch.format("created_at")
        letters = await self.query(
            f"SELECT id, lane, {self._dialect.event}, {state}, message, column_name, {written}"
            f" FROM {self._letters} WHERE {condition} ORDER BY id DESC LIMIT %s",
            *values, limit,
        )  # fmt: skip
        return found(groups, [(*rest, datetime.fromtimestamp(at, UTC)) for *rest, at in letters])

    async def count_dead(self) -> dict[str, int]:
        """See `Shelves.count_dead`: of an index alone."""
        await self.prepare(OWN_TABLES[0])
        counts: Any = await self.query(f"SELECT lane, count(*) FROM {self._letters} GROUP BY lane")
        return dict(counts)

    async def _find_unknown(self, selection: Selection, limit: int) -> dict[str, Any]:
        if not await self._has_unknown():
            return found_unknown()
        d, (condition, values) = self._dialect, self._dialect.where(selection)
        of_those = f"FROM {self._unknown} WHERE {condition}"
        ((total,),) = await self.query(f"SELECT count(*) {of_those}", *values)
        groups = await self.query(
            f"SELECT event_name, count(*), count(message), min(message) {of_those}"
            " GROUP BY event_name ORDER BY count(*) DESC, event_name LIMIT %s",
            *values, UNKNOWN_GROUPS,
        )  # fmt: skip
        events = await self.query(
            f"SELECT id, event_name, {d.unknown_event}, message, {d.epoch.format('received_at')}"
            f" {of_those} ORDER BY id DESC LIMIT %s",
            *values, limit,
        )  # fmt: skip
        newest = [(*rest, datetime.fromtimestamp(at, UTC)) for *rest, at in events]
        return found_unknown(total, groups, newest)

    async def _has_unknown(self) -> bool:
        """Whether there is a table of unknown events."""
        await self._know_version()
        there = UNKNOWN_TABLE in self._prepared
        return there or await self.columns(UNKNOWN_TABLE.name) is not None

    async def drop(self, selection: Selection) -> int:
        """See `Shelves.drop`: in the order of their ids, so none is passed over twice."""
        await self.prepare(OWN_TABLES[0])
        if selection.shelf is Shelf.UNKNOWN and not await self._has_unknown():
            return 0
        table = self._dialect.parameterized(selection.shelf.value)
        condition, values = self._dialect.where(selection)
        some = f"SELECT id FROM {table} WHERE {condition} AND id > %s ORDER BY id LIMIT %s"
        dropped = last = 0
        while ids := [id for (id,) in await self.query(some, *values, last, _DELETED_AT_ONCE)]:
            dropped, last = dropped + await self._delete(table, ids), ids[-1]
        return dropped

    async def _delete(self, table: str, ids: Sequence[int]) -> int:
        one_of = self._dialect.one_of.format("bigint")
        sql = f"DELETE FROM {table} WHERE id {one_of}"
        return (await self._own((sql, (self._dialect.listed(ids),)))).changed

    async def samples(self, names: Sequence[str], each: int) -> dict[str, list[str]]:
        """See `Shelves.samples`."""
        found: dict[str, list[str]] = {name: [] for name in names}
        if not names or not await self._has_unknown():
            return found
        newest = (
            f"SELECT * FROM (SELECT event_name, {self._dialect.unknown_event} FROM {self._unknown}"
            " WHERE event_name = %s ORDER BY id DESC LIMIT %s) AS newest"
        )
        for at in range(0, len(names), _NAMES_AT_ONCE):
            some = names[at : at + _NAMES_AT_ONCE]
            values = [value for name in some for value in (name, each)]
            for name, event in await self.query(" UNION ALL ".join([newest] * len(some)), *values):
                found[name].append(event)
        return found

    async def remove_expired(self, table: Table) -> bool:
        """See `Upkeep.remove_expired`: here of unknown events alone, a thousand at most."""
        if table.name != UNKNOWN_TABLE.name or not table.retention_s:
            return False
        if not await self._has_unknown():
            return False
        sql = (
            f"SELECT id FROM {self._unknown} WHERE received_at < {self._dialect.ago()}"
            " ORDER BY received_at LIMIT %s"  # by the index, whatever the planner thinks there is
        )
        ids = [id for (id,) in await self.query(sql, table.retention_s, _DELETED_AT_ONCE)]
        self._removed += await self._delete(self._unknown, ids) if ids else 0
        more = len(ids) == _DELETED_AT_ONCE
        if self._removed and not more:
            log.info("rows removed", lane=table.name, rows=self._removed)
            self._removed = 0
        return more
