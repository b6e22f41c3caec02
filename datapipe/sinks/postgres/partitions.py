"""What a table of events is, and its partitions by time of receipt: made ahead, or when rows come.

A partition is made as a table of its own and then attached, which takes no lock that a load waits
for, nor one that waits for a load. (Source: PostgreSQL documentation, "ALTER TABLE", ATTACH
PARTITION: SHARE UPDATE EXCLUSIVE on the parent.) Nothing is scanned: the table is empty. There is
no DEFAULT partition of ours, whose rows each attachment would have to look through.

Bounds are Unix times; the periods of the setting begin at midnight UTC.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple, TypeVar

import structlog

from datapipe.errors import LaneBlocked
from datapipe.sinks import Table
from datapipe.sinks.postgres.dialect import MARK, PostgresDialect
from datapipe.sinks.server import fetch

AHEAD = 3  # periods after that of now

# `indexed`: by a b-tree that begins with the time of receipt, of all rows. `ranged`: partitioned by
# it and nothing else. `owned`: our role may do all with the table. Source: PostgreSQL
# documentation, "System Catalogs".
_STATE = """
    SELECT extract(epoch FROM now())::float8 AS now, c.oid::bigint, c.relkind = 'p' AS partitioned,
        coalesce(p.partstrat = 'r' AND p.partnatts = 1 AND p.partattrs[0] = a.attnum, false)
            AS ranged,
        EXISTS (SELECT FROM pg_index i JOIN pg_class ic ON ic.oid = indexrelid
            JOIN pg_am ON pg_am.oid = ic.relam WHERE indrelid = c.oid AND indisvalid
            AND indpred IS NULL AND indkey[0] = a.attnum AND amname = 'btree') AS indexed,
        coalesce(obj_description(c.oid, 'pg_class') LIKE %s, false) AS marked,
        coalesce(obj_description(c.oid, 'pg_class'), '') AS comment,
        pg_has_role(c.relowner, 'USAGE') AS owned,
        has_schema_privilege(n.oid, 'CREATE') AS may_create,
        has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'DELETE') AS may_delete,
        current_user::text AS role
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_attribute a ON attrelid = c.oid AND attname = 'received_at'
        LEFT JOIN pg_partitioned_table p ON partrelid = c.oid
    WHERE nspname = %s AND relname = %s AND relkind IN ('r', 'p')
"""

# Bounds are read and written in one session, so whatever its DateStyle is.
_PARTITIONS = """
    SELECT nspname::text, relname::text, pg_has_role(relowner, 'USAGE'), bound = 'DEFAULT',
        extract(epoch FROM substring(bound FROM 'FROM [(]''([^'']+)')::timestamptz)::float8,
        extract(epoch FROM substring(bound FROM 'TO [(]''([^'']+)')::timestamptz)::float8
    FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
        JOIN pg_namespace n ON n.oid = relnamespace
        CROSS JOIN LATERAL (SELECT pg_get_expr(relpartbound, c.oid) AS bound) AS its
    WHERE inhparent = %s
"""

_T = TypeVar("_T")
Run = Callable[[Callable[[Any], Awaitable[_T]], str], Awaitable[_T]]
log = structlog.stdlib.get_logger("datapipe.sinks")


class Partition(NamedTuple):
    """One of a table's; `start` and `end` are Unix times, the latter is not within it."""

    schema: str
    name: str
    owned: bool
    start: float
    end: float


class State(NamedTuple):
    """A table as it is; see `_STATE`.

    Attributes:
        now: by the database's clock, a Unix time.
        partitions: in order, if it is `ranged`; without a DEFAULT one.
        has_default: there is one.
    """

    now: float
    oid: int
    partitioned: bool
    ranged: bool
    indexed: bool
    marked: bool
    comment: str
    owned: bool
    may_create: bool
    may_delete: bool
    role: str
    partitions: Sequence[Partition] = ()
    has_default: bool = False


async def look(cursor: Any, table: Table, dialect: PostgresDialect) -> State | None:
    """The table as it is; None: there is none. The session is in UTC."""
    found = await fetch(cursor, _STATE, (f"%{MARK}%", dialect.schema, table.name))
    if not found:
        return None
    state = State(*found[0])
    if not state.ranged:
        return state
    rows = await fetch(cursor, _PARTITIONS, (state.oid,))
    partitions = [
        Partition(
            schema, name, owned,
            -math.inf if start is None else start, math.inf if end is None else end,
        )
        for schema, name, owned, is_default, start, end in rows
        if not is_default
    ]  # fmt: skip
    partitions.sort(key=lambda each: each.start)
    return state._replace(partitions=partitions, has_default=len(partitions) < len(rows))


def period(partition: str, at: float) -> tuple[float, float]:
    """The day, the week (from Monday) or the month in UTC that holds a time; its end is the next's
    beginning.
    """
    day = datetime.fromtimestamp(at, UTC).date()
    if partition == "week":
        first = day - timedelta(days=day.weekday())
        return _midnight(first), _midnight(first + timedelta(days=7))
    if partition == "month":
        first = day.replace(day=1)
        return _midnight(first), _midnight((first + timedelta(days=31)).replace(day=1))
    return _midnight(day), _midnight(day + timedelta(days=1))


def _midnight(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def ahead(partition: str, now: float) -> list[float]:
    """The beginning of the period of now, and of those after it."""
    begins = [period(partition, now)[0]]
    for _ in range(AHEAD):
        begins.append(period(partition, begins[-1])[1])
    return begins


def gap(partitions: Iterable[Partition], partition: str, at: float) -> tuple[float, float] | None:
    """The period of a time without what others hold, such as those of another setting before.

    None: one of them holds the time.
    """
    start, end = period(partition, at)
    for each in partitions:
        if each.start <= at < each.end:
            return None
        if each.end <= at:
            start = max(start, each.end)
        else:
            end = min(end, each.start)
    return start, end


def moment(at: float) -> str:
    """A time for people: UTC, to the minute."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


class Partitions:
    """Makes partitions; `run` does work with a cursor, and raises our errors.

    Args: begin: of a transaction that makes tables, which waits for others that do.
    """

    def __init__(self, dialect: PostgresDialect, run: Run[Any], begin: str) -> None:
        self._dialect = dialect
        self._run = run
        self._begin = begin

    async def state(self, table: Table) -> State | None:
        """The table as it is. Raises: SinkUnavailable, LaneBlocked."""

        async def work(cursor: Any) -> State | None:
            await cursor.execute("BEGIN READ ONLY; SET LOCAL timezone = 'UTC'")
            found = await look(cursor, table, self._dialect)
            await cursor.execute("COMMIT")
            return found

        found: State | None = await self._run(work, table.name)
        return found

    async def make_ahead(self, table: Table) -> list[str]:
        """See `Upkeep.make_ahead`."""
        state = await self.state(table) if table.partition else None
        if state is None or not (state.marked and state.ranged):
            return []
        assert table.partition is not None
        return await self._make(table, state, ahead(table.partition, state.now))

    async def make(self, table: Table, times: Iterable[float]) -> list[str]:
        """Partitions for rows that were received then; the DDL that has been run.

        Raises: LaneBlocked: they are not ours to make, or we have no right to.
        """
        state = await self.state(table)
        if state is None:
            return []  # it will be made anew
        if not state.ranged:
            raise LaneBlocked(
                f"table {table.name}: has no partition for some rows, and is not partitioned by "
                "RANGE (received_at) alone, so its partitions are yours to make"
            )
        if not state.marked:
            raise LaneBlocked(
                f"table {table.name}: has no partition for some rows, and is not one that datapipe "
                f"made: make them, or let datapipe: datapipe schema --adopt {table.name}"
            )
        return await self._make(table, state, sorted(times))

    async def _make(self, table: Table, state: State, times: Iterable[float]) -> list[str]:
        """Each in a transaction of its own: so few locks are held, and for a moment."""
        ran: list[str] = []
        assert table.partition is not None
        for at in times:
            if gap(state.partitions, table.partition, at) is None:
                continue
            if denied := self.denied(table, state):
                raise LaneBlocked(f"table {table.name}: {denied}")
            work = partial(self._make_one, table=table, at=at)
            state, statements = await self._run(work, table.name)
            ran += statements
        return ran

    async def _make_one(self, cursor: Any, table: Table, at: float) -> tuple[State, list[str]]:
        """That of one time, if it is still missing; the table as it is then, and the DDL."""
        await cursor.execute(self._begin)
        state = await look(cursor, table, self._dialect)
        if state is None:
            raise LaneBlocked(f"table {table.name}: was dropped")
        assert table.partition is not None
        bounds = gap(state.partitions, table.partition, at)
        if bounds is None:
            await cursor.execute("COMMIT")
            return state, []
        name = await self._free_name(cursor, table, bounds[0])
        statements = self._statements(table, name, *bounds)
        for statement in statements:
            await cursor.execute(statement)
        state = await look(cursor, table, self._dialect) or state
        await cursor.execute("COMMIT")
        log.info("partition made", lane=table.name, partition=name)
        return state, statements

    def _statements(self, table: Table, name: str, start: float, end: float) -> list[str]:
        """What makes a partition. Its own columns are no identities: those are the parent's."""
        parent, name = self._dialect.table(table.name), self._dialect.table(name)
        first, last = (f"'{datetime.fromtimestamp(each, UTC)}'" for each in (start, end))
        return [
            f"CREATE TABLE {name} (LIKE {parent} INCLUDING ALL EXCLUDING IDENTITY)",
            f"ALTER TABLE {parent} ATTACH PARTITION {name} FOR VALUES FROM ({first}) TO ({last})",
        ]

    async def _free_name(self, cursor: Any, table: Table, start: float) -> str:
        """One that nobody has: an older partition that was detached may still be there."""
        name = f"{table.name}_p{datetime.fromtimestamp(start, UTC):%Y%m%d}"
        for free in chain([name], (f"{name}_{n}" for n in count(2))):
            sql = "SELECT to_regclass(%s) IS NULL"
            if await fetch(cursor, sql, (self._dialect.table(free),)) == [(True,)]:
                break
        return free

    def denied(self, table: Table, state: State) -> str | None:
        """Why our role can't make and remove partitions, and the statements that let it."""
        if state.owned and state.may_create:
            return None
        quote, role = self._dialect.quote, state.role
        grants = []
        if not state.owned:
            grants.append(f"ALTER TABLE {self._dialect.table(table.name)} OWNER TO {quote(role)}")
        if not state.may_create:
            grants.append(f"GRANT CREATE ON SCHEMA {quote(self._dialect.schema)} TO {quote(role)}")
        return f"{role} may not make or remove its partitions: {'; '.join(grants)}"
