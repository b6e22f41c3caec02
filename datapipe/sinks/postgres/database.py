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
from datapipe.sinks.postgres.ddl import (
    DDL_LOCK,
    OWN_TABLES,
    add_columns,
    create_indexes,
    create_table,
    ddl,
    qualified,
    quote,
)
from datapipe.sinks.postgres.errors import Verdict, error_of, is_away, one_line, verdict
from datapipe.sinks.transactional import TransactionalSink

# Nothing that is done here need wait for a synchronous standby, which may be away for hours: DDL is
# repeated where it is missing, a heartbeat comes every 5 s, ledger rows that come back do no harm.
# A load's own COMMIT waits for all that was written before it.
_BEGIN = (
    f"BEGIN; {PEER_MAY_VANISH} SET LOCAL lock_timeout = '5s'; SET LOCAL synchronous_commit = local"
)

_CONNECTIONS = 2  # at once

_T = TypeVar("_T")


class Database(TransactionalSink):
    """Where the tables are; it need not be there yet."""

    product = "PostgreSQL"

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        super().__init__(settings.database_schema)
        self._data_dir = Path(settings.data_dir)
        self._stack = stack
        url = settings.database_url
        self._dsn = connection_dsn(url) if url else None
        self._psql = 'psql "$DATABASE_URL"'
        self._pool = Pool(self.dsn, _CONNECTIONS)
        self._starting = asyncio.Lock()
        self._preparing = asyncio.Lock()
        self._prepared: set[Table] = set()

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
            self.down(one_line(exc))
        return error_of(exc, lane)

    async def hint(self) -> str:
        """See `Sink.hint`."""
        await self.dsn()
        return f"{self._psql} -c {shlex.quote('SELECT * FROM crash_report')}"

    def ddl(self, tables: Sequence[Table]) -> str:
        """See `Sink.ddl`."""
        return ddl(self._schema, tables)

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
        """The rows of one statement."""
        return await self.run(partial(fetch, sql=sql, values=values), lane)

    async def transaction(self, *statements: tuple[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Statements on our own tables, all or nothing; the rows of the last."""
        await self.prepare(OWN_TABLES[0])

        async def work(cursor: aiopg.Cursor) -> list[tuple[Any, ...]]:
            await cursor.execute(_BEGIN)
            for sql, values in statements:
                rows = await fetch(cursor, sql, values)
            await cursor.execute("COMMIT")
            return rows

        return await self.run(work)

    # --- tables ---

    async def prepare(self, table: Table, *, again: bool = False) -> None:
        """Make the lane's table, its missing columns and our own tables, once.

        Raises: SinkUnavailable, LaneBlocked.
        """
        wanted = (*OWN_TABLES, table)
        if not again and self._prepared.issuperset(wanted):
            return  # nor does it wait for what another table waits for
        async with self._preparing:
            for each in wanted:
                if again or each not in self._prepared:
                    await self.run(partial(self._make, table=each), table.name)
                    self._prepared.add(each)

    async def _make(self, cursor: aiopg.Cursor, table: Table) -> None:
        await self._read_version(cursor)
        if not await self._missing(cursor, table):
            return  # nothing to do, and no lock taken
        await cursor.execute(_BEGIN)
        await cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
        for statement in await self._missing(cursor, table):
            await cursor.execute(statement)
        await cursor.execute("COMMIT")

    async def _missing(self, cursor: aiopg.Cursor, table: Table) -> list[str]:
        """The statements that would make the table as it should be."""
        found = await fetch(
            cursor,
            "SELECT c.relkind, array_agg(a.attname::text)"
            " FROM pg_namespace n"
            " LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s"
            " LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND attnum > 0 AND NOT attisdropped"
            " WHERE n.nspname = %s GROUP BY n.oid, c.relkind",
            (table.name, self._schema),
        )
        schema = [] if found else [f"CREATE SCHEMA {quote(self._schema)}"]
        if not found or found[0][0] is None:
            made = create_table(self._schema, table)
            return [*schema, made, *create_indexes(self._schema, table)]
        missing = [column for column in table.columns if column.name not in found[0][1]]
        return [add_columns(self._schema, table, missing)] if missing else []

    async def _read_version(self, cursor: aiopg.Cursor) -> None:
        if self.version is None:
            ((version,),) = await fetch(cursor, "SHOW server_version")
            self.version = version.split(" ")[0]

    # --- check ---

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `Sink.check`."""
        try:
            await self.run(self._read_version)
            found = [("ok", f"database: PostgreSQL {self.version}, schema {self._schema}")]
            ((encoding,),) = await self.query("SHOW server_encoding")
            if encoding != "UTF8":
                text = "events with text that it lacks become dead letters; UTF8 holds all"
                found.append(("warn", f"database: its encoding is {encoding}: {text}"))
            for table in (*OWN_TABLES, *tables):
                found += await self.run(partial(self._check, table=table))
        except (SinkUnavailable, LaneBlocked) as exc:
            return [("away" if is_away(exc.__cause__) else "fail", f"database: {exc}")]
        return found

    async def _check(self, cursor: aiopg.Cursor, table: Table) -> list[tuple[str, str]]:
        if await self._missing(cursor, table):
            if denied := await self._denied(cursor, table):
                return [("fail", f"table {table.name}: {denied}")]
            return [("ok", f"table {table.name}: will be made or completed when it is needed")]
        name = qualified(self._schema, table.name)
        sql = "SELECT relpersistence = 'u' FROM pg_class WHERE oid = %s::regclass"
        ((unlogged,),) = await fetch(cursor, sql, (name,))
        if unlogged:
            text = "is UNLOGGED: a crash of the database empties it, rows and all"
            return [("warn", f"table {table.name}: {text}")]
        return []

    async def _denied(self, cursor: aiopg.Cursor, table: Table) -> str | None:
        """The right that our role lacks to make or complete this table, and the remedy."""
        found = await fetch(
            cursor,
            "SELECT current_user::text, current_database()::text, n.oid IS NULL, c.oid IS NULL,"
            " CASE WHEN n.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')"
            " WHEN c.oid IS NULL THEN has_schema_privilege(n.oid, 'CREATE')"
            " ELSE pg_has_role(c.relowner, 'USAGE') END"
            " FROM (VALUES (1)) AS one LEFT JOIN pg_namespace n ON n.nspname = %s"
            " LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s",
            (self._schema, table.name),
        )
        ((role, database, no_schema, no_table, may),) = found
        if may:
            return None
        if not no_table:
            return f"lacks columns, and only its owner may add them, not {role}"
        within = f"DATABASE {quote(database)}" if no_schema else f"SCHEMA {quote(self._schema)}"
        return f"is missing, and {role} may not make it: GRANT CREATE ON {within} TO {quote(role)}"


async def fetch(
    cursor: aiopg.Cursor, sql: str, values: Sequence[Any] = ()
) -> list[tuple[Any, ...]]:
    """The rows of a statement; of one without rows, none."""
    await cursor.execute(sql, values)
    rows: list[tuple[Any, ...]] = await cursor.fetchall() if cursor.description else []
    return rows
