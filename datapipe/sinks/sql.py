"""What databases that speak SQL do alike: tables, ledger, heartbeats, dead letters.

Written once in SQL that all of them have; in what they differ is a `Dialect`. A database brings a
`SqlTransaction` for its loads and is a `SqlSink`.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import structlog

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import UNKNOWN_GROUPS, Beat, Heartbeat, Mark, Selection, Shelf, Table
from datapipe.sinks.dialect import OWN_TABLES, UNKNOWN_TABLE, Dialect
from datapipe.sinks.letters import found, found_unknown
from datapipe.sinks.sql_transaction import sliced
from datapipe.sinks.transaction import RENEWED_S, TableMissing
from datapipe.sinks.transactional import TransactionalSink

_HOUR_S = 3600.0
# An IronMQ message lives 30 days at the most, so its segment's ledger row must live longer.
_IRONMQ_S = 31 * 24 * _HOUR_S

# What others wait for is known by their last heartbeat, which may be some seconds old.
_BEAT_SLACK_S = 15.0

# Each of those that share a mirror shows the oldest that waits for them all, so one that another of
# them has outlived by so long says nothing any more. The last one seen does: what their mirror
# holds may come back with it.
_OUTLIVED_S = 60.0

_UNKNOWN_AGE_S = 1e9  # before anything that a ledger holds

_DELETED_AT_ONCE = 1000  # rows of a shelf, so that each statement is soon done
_NAMES_AT_ONCE = 100  # SQLite takes 500 SELECTs in one

log = structlog.stdlib.get_logger("datapipe.sinks")

Statement = tuple[str, Sequence[Any]]
_T = TypeVar("_T")


class Result(NamedTuple):
    """Of a statement: its rows, if it gives any, and how many it has changed."""

    rows: list[tuple[Any, ...]]
    changed: int


class _Process(NamedTuple):
    """A row of `datapipe_processes`; times are Unix times by the database's clock, as is `now`."""

    process: str
    mirror: str
    seen: float
    oldest: float | None
    now: float

    @property
    def group(self) -> str:
        return self.mirror.rpartition(":")[0]


class SqlSink(TransactionalSink):
    """See `Database`. A subclass says how statements reach its server, and sets `product`."""

    def __init__(self, dialect: Dialect, settings: Settings, process: str) -> None:
        super().__init__(dialect.schema or "main")
        self._dialect = dialect
        self._process = process
        self._dedupe_window_s = settings.dedupe_window
        self._ledger, self._letters, self._processes, self._unknown = (
            dialect.parameterized(f"datapipe_{name}")
            for name in ("ledger", "dead_letters", "processes", "unknown")
        )
        self._one_of = dialect.one_of.format("text")
        self._mark_of = f"SELECT body, events FROM {self._ledger} WHERE segment = %s"
        self._preparing = asyncio.Lock()
        self._prepared: set[Table] = set()
        self._removed = 0  # unknown events, since none were left that are too old

    @abstractmethod
    async def query(self, sql: str, *values: Any, lane: str | None = None) -> list[tuple[Any, ...]]:
        """The rows of one statement, in a transaction of its own.

        Args: lane: whose work it is, if it is one lane's.
        Raises: SinkUnavailable; of a lane's: LaneBlocked, TableMissing.
        """

    @abstractmethod
    async def transaction(self, *statements: Statement) -> Result:
        """Statements on our own tables, all or nothing; the result of the last.

        It need not wait for a standby: heartbeats come again, ledger rows that come back do no
        harm, and a load's own COMMIT waits for all that was written before it.
        Raises: SinkUnavailable, LaneBlocked; TableMissing: a right may be missing, too.
        """

    @abstractmethod
    async def read_version(self) -> str:
        """The server's. Raises: SinkUnavailable, LaneBlocked."""

    @abstractmethod
    async def columns(self, table: str) -> set[str] | None:
        """Those that a table has; None: there is no such table. Raises: SinkUnavailable."""

    @abstractmethod
    async def define(self, table: str, changes: Callable[[set[str] | None], Sequence[str]]) -> None:
        """Run the DDL that a table with these columns needs (see `columns`).

        Processes do it one after the other, and each looks anew: IF NOT EXISTS alone fails for one
        of two that come at once. Raises: SinkUnavailable, LaneBlocked.
        """

    @abstractmethod
    async def findings(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """What `check` has to say of the server, and of these tables, as they are.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def denied(self, table: Table, changes: Sequence[str]) -> str | None:
        """Which rights we lack to use this table as we do, and the statements that grant them.

        Never raises an error of the server's, for the sake of its log: this is asked again and
        again. None: we lack none, or the database has no rights.

        Args: changes: the DDL that makes or completes the table; maybe none.
        Raises: SinkUnavailable, LaneBlocked.
        """
        return None

    @abstractmethod
    def is_away(self, exc: BaseException | None) -> bool:
        """Whether the server does not answer now, or has no room: not a matter of settings."""

    # --- tables ---

    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        """See `TransactionalSink.prepare`; our own tables, too."""
        wanted = (*OWN_TABLES, complete(table))
        if again:
            self._prepared.difference_update(wanted)
        if self._prepared.issuperset(wanted):
            return []  # nor does it wait for what another table waits for
        ran: list[str] = []
        async with self._preparing:
            await self._know_version()
            for each in wanted:
                if each not in self._prepared:
                    ran += await self._make(each)
                    self._prepared.add(each)
        return ran

    async def _know_version(self) -> None:
        if self.version is None:
            self.version = await self.read_version()

    async def _make(self, table: Table) -> list[str]:
        """Make or complete a table; the DDL that it took.

        Raises: SinkUnavailable, LaneBlocked; without a right of ours on one of our own tables
        nothing works, so that the database is down.
        """
        needed = self._changes(table, await self.columns(table.name))
        if denied := await self.denied(table, needed):
            why = f"table {table.name}: {denied}"
            if table in OWN_TABLES:
                self.down(why, refuses=True)
                raise SinkUnavailable(why)
            raise LaneBlocked(why)
        ran: list[str] = []

        def changes(there: set[str] | None) -> list[str]:
            ran[:] = self._changes(table, there)
            return ran

        if needed:
            await self.define(table.name, changes)
        return ran

    def _changes(self, table: Table, there: set[str] | None) -> list[str]:
        """The statements that make the table as it should be.

        Raises: LaneBlocked: it belongs to somebody else.
        """
        if there is None:
            return self._dialect.create(table)
        if not table.is_own and "received_at" not in there:
            received = [column for column in table.columns if column.name == "received_at"]
            raise LaneBlocked(
                f"table {table.name}: has no column received_at, so it is not datapipe's, and "
                "nothing is added to it: rename the event type, or, if its events belong there: "
                f"{'; '.join(self._dialect.add_columns(table, received))}"
            )
        missing = [column for column in table.columns if column.name not in there]
        return self._dialect.add_columns(table, missing)

    def ddl(self, tables: Sequence[Table]) -> str:
        """See `Sink.ddl`."""
        return self._dialect.script([complete(table) for table in tables])

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `Sink.check`."""
        try:
            await self._know_version()
            schema = f", schema {self._dialect.schema}" if self._dialect.schema else ""
            said = [("ok", f"database: {self.product} {self.version}{schema}")]
            wanted = (*OWN_TABLES, *map(complete, tables))
            said += await self.findings(wanted)
            for table in wanted:
                said += await self._check(table)
        except (SinkUnavailable, LaneBlocked) as exc:
            level = "away" if self.is_away(exc.__cause__) else "fail"
            state = self.state()
            which = f"{self.product} {state.trouble}: " if state.up is False else ""
            return [(level, f"database: {which}{exc}")]
        return said

    async def _check(self, table: Table) -> list[tuple[str, str]]:
        try:
            there = await self.columns(table.name)
            changes = self._changes(table, there)
        except LaneBlocked as exc:
            return [("fail", str(exc))]
        if denied := await self.denied(table, changes):
            return [("fail", f"table {table.name}: {denied}")]
        if changes:
            return [("ok", f"table {table.name}: {self._planned(table, there)} when needed")]
        return []

    def _planned(self, table: Table, there: set[str] | None) -> str:
        if there is None:
            return "will be created"
        missing = [column.name for column in table.columns if column.name not in there]
        return f"will add the column{'s' if missing[1:] else ''} {', '.join(missing)}"

    # --- ledger ---

    async def _own(self, *statements: Statement) -> Result:
        """The same as `transaction`; our tables are there, and may be used."""
        await self.prepare(OWN_TABLES[0])
        try:
            return await self.transaction(*statements)
        except TableMissing:  # dropped, altered or forbidden since
            await self.prepare(OWN_TABLES[0], again=True)
            return await self.transaction(*statements)

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """See `Ledger.loaded`."""
        await self.prepare(OWN_TABLES[0])
        sql = f"SELECT segment FROM {self._ledger} WHERE segment {self._one_of}"
        known: set[str] = set()
        for some in sliced(segments):
            known |= {id for (id,) in await self.query(sql, self._dialect.listed(some))}
        return known

    async def expire(self, removed: Sequence[str]) -> None:
        """See `Ledger.expire`."""
        d = self._dialect
        await self.prepare(OWN_TABLES[0])
        seen, oldest, now = (d.epoch.format(each) for each in ("seen_at", "oldest_waiting", d.now))
        sql = f"SELECT process, coalesce(mirror, ''), {seen}, {oldest}, {now} FROM "
        processes = [_Process(*row) for row in await self.query(f"{sql}{self._processes}")]
        outlived_s = _outlived(processes)
        # also what waits in the mirror of a process that is dead: it could hold the same event
        waiting_s = [
            each.now - each.oldest
            for each in processes
            if each.oldest is not None and outlived_s[each.process] < _OUTLIVED_S
        ]
        keys_s = self._dedupe_window_s + _BEAT_SLACK_S + max([0.0, *waiting_s])
        # before what was seen waiting, however much later the DELETE comes
        keys_until = max((each.now for each in processes), default=0.0) - keys_s
        gone = [
            each.process
            for each in processes
            if each.now - each.seen > (_HOUR_S if each.oldest is None else _IRONMQ_S)
            or outlived_s[each.process] > _HOUR_S
        ]
        await self.forget(
            *((f"segment {self._one_of}", (d.listed(some),)) for some in sliced(removed)),
            (f"kind = 'part' AND loaded_at < {d.at.format('%s')}", (keys_until,)),
            (f"kind = 'claim' AND loaded_at < {d.at.format('%s')}", (keys_until - RENEWED_S,)),
            (
                f"kind = 'segment' AND source = 'ironmq' AND loaded_at < {d.ago()}",
                (_IRONMQ_S,),
            ),
        )
        if gone:
            await self._own(
                (
                    f"DELETE FROM {self._processes} WHERE process {self._one_of}"
                    f" AND seen_at < {d.ago()}",  # it may have come back since we looked
                    (d.listed(gone), _HOUR_S),
                )
            )

    async def forget(self, *conditions: Statement) -> None:
        """Delete those rows of the ledger; not those of transactions under way.

        Raises: SinkUnavailable, LaneBlocked.
        """
        await self._own(
            *((f"DELETE FROM {self._ledger} WHERE {sql}", values) for sql, values in conditions)
        )

    async def expire_source(self, source: str, process: str) -> None:
        """See `Ledger.expire_source`."""
        of_others = "= %s AND process <> %s"
        await self.forget((f"source {of_others}", (source, process)))
        await self._own(
            (f"DELETE FROM {self._processes} WHERE mirror {of_others}", (source, process))
        )

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        """See `Ledger.expire_lanes`."""
        sql = (
            "kind = 'segment' AND source = %s AND lane = %s"
            f" AND loaded_at < {self._dialect.at.format('%s')}"
        )
        if before:
            await self.forget(*((sql, (source, lane, at)) for lane, at in before.items()))

    async def now(self) -> float:
        """See `Ledger.now`."""
        await self.prepare(OWN_TABLES[0])
        ((now,),) = await self.query(f"SELECT {self._dialect.epoch.format(self._dialect.clock)}")
        return float(now)

    async def find_mark(self, prefix: str) -> Mark | None:
        """See `Ledger.find_mark`."""
        if await self.columns("datapipe_ledger") is None:
            return None
        rows = await self.query(self._mark_of, f"cluster:{prefix}")
        return Mark(rows[0][0], rows[0][1] == 1) if rows else None

    async def mark(self, prefix: str) -> Mark:
        """See `Ledger.mark`."""
        ((id, confirmed),) = (
            await self._own(
                (
                    f"INSERT INTO {self._ledger} (segment, kind, body, process)"
                    f" VALUES (%s, 'cluster', %s, %s)"
                    f" {self._dialect.unless_there.format('segment')}",
                    (f"cluster:{prefix}", uuid4().hex, self._process),
                ),
                (self._mark_of, (f"cluster:{prefix}",)),
            )
        ).rows
        return Mark(id, confirmed == 1)

    async def confirm_mark(self, prefix: str, id: str) -> None:
        """See `Ledger.confirm_mark`."""
        sql = f"UPDATE {self._ledger} SET events = 1 WHERE segment = %s AND body = %s"
        await self._own((sql, (f"cluster:{prefix}", id)))

    # --- heartbeats ---

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        """See `Heartbeats.heartbeat`."""
        d = self._dialect
        mirror = f"{beat.group}:{beat.mirror}" if beat.group else beat.mirror
        age_s = None if beat.oldest_s is None else min(beat.oldest_s, _UNKNOWN_AGE_S)
        began = time.perf_counter()
        result = await self._own(
            (
                f"INSERT INTO {self._processes} (process, mirror, host) VALUES (%s, %s, %s)"
                f" {d.unless_there.format('process')}",
                (beat.process, mirror, beat.host),
            ),
            (
                f"UPDATE {self._processes} SET seen_at = {d.now}, beats = beats + 1, ended = %s,"
                f" oldest_waiting = {d.ago()} WHERE process = %s",
                (beat.ended, age_s, beat.process),
            ),
            (
                f"DELETE FROM {self._processes} WHERE mirror = %s AND process <> %s",
                (mirror, beat.process),
            ),
            (f"SELECT process, beats, ended, host, mirror FROM {self._processes}", ()),
        )
        self.works(began)
        return {
            process: Beat(beats, bool(ended), host or "", (mirror or "").rpartition(":")[0])
            for process, beats, ended, host, mirror in result.rows
        }

    # --- dead letters, unknown events ---

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


def _outlived(processes: Sequence[_Process]) -> dict[str, float]:
    """By how long another process of the same group was seen later, in seconds; without a group 0,
    as for the last one of it.
    """
    last: dict[str, float] = {}
    for each in processes:
        last[each.group] = max(each.seen, last.get(each.group, each.seen))
    return {each.process: last[each.group] - each.seen if each.group else 0.0 for each in processes}


def complete(table: Table) -> Table:
    """With the columns that no row brings, which the table of unknown events has."""
    return UNKNOWN_TABLE if table.name == UNKNOWN_TABLE.name else table
