"""The database as all but the loads see it: where it is, whether it is up, what tables it has.

All of this goes through a pool. Its connections are dead after a restart of the server and may say
so only when used, so a failure of the connection is tried once more on a new one.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiopg
import psycopg2

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import Table
from datapipe.sinks.postgres.connections import PEER_MAY_VANISH, Pool, connection_dsn
from datapipe.sinks.postgres.dialect import dialect
from datapipe.sinks.postgres.errors import error_of, is_away, one_line, reason, verdict
from datapipe.sinks.sql import Result, SqlSink, Statement
from datapipe.sinks.verdict import Verdict

# Nothing that is done here need wait for a synchronous standby, which may be away for hours: DDL is
# repeated where it is missing, a heartbeat comes every 5 s, ledger rows that come back do no harm.
# A load's own COMMIT waits for all that was written before it.
_BEGIN = (
    f"BEGIN; {PEER_MAY_VANISH} SET LOCAL lock_timeout = '5s'; SET LOCAL synchronous_commit = local"
)

_CONNECTIONS = 2  # at once

_DDL_LOCK = 0x64617461_70697065  # "datapipe": one key for all DDL of ours in a database

_T = TypeVar("_T")


class Database(SqlSink):
    """Where the tables are; it need not be there yet."""

    product = "PostgreSQL"

    def __init__(self, settings: Settings, process: str, stack: AsyncExitStack) -> None:
        super().__init__(dialect(settings.database_schema), settings, process)
        self._data_dir = Path(settings.data_dir)
        self._stack = stack
        url = settings.database_url
        self._dsn = connection_dsn(url) if url else None
        self._psql = 'psql "$DATABASE_URL"'
        self._pool = Pool(self.dsn, _CONNECTIONS)
        self._starting = asyncio.Lock()

    async def dsn(self) -> str:
        """The libpq connection string; starts the embedded server where that is meant.

        Raises: SinkUnavailable: it does not start.
        """
        async with self._starting:
            if self._dsn is None:
                from datapipe.sinks.postgres.embedded import embedded_postgres

                try:
                    server = await self._stack.enter_async_context(
                        embedded_postgres(self._data_dir)
                    )
                except SinkUnavailable as exc:
                    self.down(str(exc))
                    raise
                self._psql = server.psql
                self._dsn = connection_dsn(server.url)
            return self._dsn

    def error(self, exc: psycopg2.Error, lane: str | None) -> SinkUnavailable | LaneBlocked:
        """Our error to raise for it; notes that the database is down, if that is what it means."""
        if verdict(exc) is Verdict.DOWN:
            self.down(reason(exc))
        return error_of(exc, lane)

    async def hint(self) -> str:
        """See `Sink.hint`."""
        await self.dsn()
        return f"{self._psql} -c {shlex.quote('SELECT * FROM crash_report')}"

    # --- work through the pool ---

    async def run(
        self, work: Callable[[aiopg.Cursor], Awaitable[_T]], lane: str | None = None
    ) -> _T:
        """Do something on a pooled connection, in autocommit; on a dead one, once more.

        Args: lane: whose work it is, if it is one lane's.
        Raises: SinkUnavailable, or LaneBlocked for what only a person can repair.
        """
        try:
            try:
                return await self._once(work)
            except psycopg2.Error as exc:
                if verdict(exc) is not Verdict.DOWN:
                    raise
                return await self._once(work)
        except psycopg2.Error as exc:
            raise self.error(exc, lane) from exc

    async def _once(self, work: Callable[[aiopg.Cursor], Awaitable[_T]]) -> _T:
        try:
            async with self._pool.cursor() as cursor:
                started = time.perf_counter()
                result = await work(cursor)
                self.answer_s = time.perf_counter() - started
        except (TimeoutError, OSError) as exc:
            self._pool.renew()
            raise psycopg2.OperationalError(one_line(exc)) from exc
        except psycopg2.Error as exc:
            if verdict(exc) is Verdict.DOWN:
                self._pool.renew()
            raise
        if self.state().up is None:
            self.works(started)
        return result

    async def query(self, sql: str, *values: Any, lane: str | None = None) -> list[tuple[Any, ...]]:
        """See `SqlSink.query`."""
        return await self.run(partial(fetch, sql=sql, values=values), lane)

    async def transaction(self, *statements: Statement) -> Result:
        """See `SqlSink.transaction`."""

        async def work(cursor: aiopg.Cursor) -> Result:
            await cursor.execute(_BEGIN)
            for sql, values in statements:
                result = Result(await fetch(cursor, sql, values), cursor.rowcount)
            await cursor.execute("COMMIT")
            return result

        return await self.run(work)

    async def read_version(self) -> str:
        """See `SqlSink.read_version`."""
        ((version,),) = await self.query("SHOW server_version")
        return str(version).split(" ")[0]

    # --- tables ---

    async def columns(self, table: str) -> set[str] | None:
        """See `SqlSink.columns`."""
        return await self.run(partial(self._columns, table=table), table)

    async def _columns(self, cursor: aiopg.Cursor, table: str) -> set[str] | None:
        found = await fetch(
            cursor,
            "SELECT array_agg(attname::text) FILTER (WHERE attnum > 0 AND NOT attisdropped)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
            " LEFT JOIN pg_attribute ON attrelid = c.oid"
            " WHERE relname = %s AND nspname = %s GROUP BY c.oid",
            (table, self._dialect.schema),
        )
        return set(found[0][0] or ()) if found else None

    async def define(self, table: str, changes: Callable[[set[str] | None], Sequence[str]]) -> None:
        """See `SqlSink.define`."""
        schema = self._dialect.schema

        async def work(cursor: aiopg.Cursor) -> None:
            await cursor.execute(_BEGIN)
            await cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_DDL_LOCK,))
            there = "SELECT 1 FROM pg_namespace WHERE nspname = %s"
            if not await fetch(cursor, there, (schema,)):
                await cursor.execute(f"CREATE SCHEMA {self._dialect.quote(schema)}")
            for statement in changes(await self._columns(cursor, table)):
                await cursor.execute(statement)
            await cursor.execute("COMMIT")

        await self.run(work, table)

    # --- check ---

    def is_away(self, exc: BaseException | None) -> bool:
        """See `SqlSink.is_away`."""
        return is_away(exc)

    async def findings(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `SqlSink.findings`."""
        if await self._begin_ends_it():
            text = "a pooler in statement mode has no transactions: set pool_mode = transaction"
            return [("fail", f"database: BEGIN ends the connection: {text} (PgBouncer)")]
        found = []
        ((encoding,),) = await self.query("SHOW server_encoding")
        if encoding != "UTF8":
            text = "events with text that it lacks become dead letters; UTF8 holds all"
            found.append(("warn", f"database: its encoding is {encoding}: {text}"))
        for (name,) in await self.query(
            "SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
            f" WHERE nspname = %s AND relname {self._one_of} AND relpersistence = 'u'",
            self._dialect.schema, self._dialect.listed([table.name for table in tables]),
        ):  # fmt: skip
            text = "is UNLOGGED: a crash of the database empties it, rows and all"
            found.append(("warn", f"table {name}: {text}"))
        for table in tables:
            if denied := await self._denied(table):
                found.append(("fail", f"table {table.name}: {denied}"))
        return found

    async def _begin_ends_it(self) -> bool:
        """Whether a transaction costs the connection, where single statements are answered."""

        async def begin(cursor: aiopg.Cursor) -> None:
            await cursor.execute("BEGIN")  # alone: with a ROLLBACK behind it would pass
            await cursor.execute("ROLLBACK")

        try:
            await self.run(begin)
        except SinkUnavailable:
            await self.query("SELECT 1")
            return True
        return False

    async def _denied(self, table: Table) -> str | None:
        """The right that our role lacks to make or complete this table, and the remedy."""
        rows = await self.query(
            "SELECT current_user::text, current_database()::text, n.oid IS NULL, c.oid IS NULL,"
            " CASE WHEN n.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')"
            " WHEN c.oid IS NULL THEN has_schema_privilege(n.oid, 'CREATE')"
            " ELSE pg_has_role(c.relowner, 'USAGE') END"
            " FROM (VALUES (1)) AS one LEFT JOIN pg_namespace n ON n.nspname = %s"
            " LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s",
            self._dialect.schema, table.name,
        )  # fmt: skip
        ((role, database, no_schema, no_table, may),) = rows
        there = await self.columns(table.name)
        if may or (there is not None and there.issuperset(each.name for each in table.columns)):
            return None
        if not no_table:
            return f"lacks columns, and only its owner may add them, not {role}"
        quote = self._dialect.quote
        within = f"DATABASE {quote(database)}" if no_schema else f"SCHEMA {quote(self._schema)}"
        return f"is missing, and {role} may not make it: GRANT CREATE ON {within} TO {quote(role)}"


async def fetch(
    cursor: aiopg.Cursor, sql: str, values: Sequence[Any] = ()
) -> list[tuple[Any, ...]]:
    """The rows of a statement; of one without rows, none."""
    await cursor.execute(sql, values)
    rows: list[tuple[Any, ...]] = await cursor.fetchall() if cursor.description else []
    return rows
