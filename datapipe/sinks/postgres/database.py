"""The database as all but the loads see it: where it is, what tables it has."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import aiopg
import psycopg2

from datapipe.errors import SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import Table
from datapipe.sinks.postgres.connections import (
    PEER_MAY_VANISH,
    AiopgPool,
    Loads,
    connection_dsn,
)
from datapipe.sinks.postgres.dialect import dialect
from datapipe.sinks.postgres.errors import has_answered, is_away, reason, verdict
from datapipe.sinks.postgres.partitions import Partitions
from datapipe.sinks.postgres.retention import Retention
from datapipe.sinks.server import ServerSink, fetch
from datapipe.sinks.verdict import Verdict

# Nothing that is done here need wait for a synchronous standby, which may be away for hours: DDL is
# repeated where it is missing, a heartbeat comes every 5 s, ledger rows that come back do no harm.
# A load's own COMMIT waits for all that was written before it.
_BEGIN = (
    f"BEGIN; {PEER_MAY_VANISH} SET LOCAL lock_timeout = '5s'; SET LOCAL synchronous_commit = local"
)

# What we do with our own tables; a row of the ledger, and a dead letter, is locked FOR UPDATE. The
# sequence of an identity column needs no right. Rows of events are only written, by COPY.
_OWN_RIGHTS = ["SELECT", "INSERT", "UPDATE", "DELETE"]

# For our role: whether there are schema and table, whether what is missing may be made, whether
# names in the schema may be used; and which rights on the table are lacking. That to INSERT may be
# given for the table, or for each column.
_RIGHTS = """
    SELECT current_user::text, current_database()::text, n.oid IS NOT NULL, c.oid IS NOT NULL,
        CASE WHEN n.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')
            WHEN c.oid IS NULL THEN has_schema_privilege(n.oid, 'CREATE')
            ELSE pg_has_role(c.relowner, 'USAGE') END,
        n.oid IS NULL OR has_schema_privilege(n.oid, 'USAGE'),
        ARRAY(SELECT used FROM unnest(%s) AS used
            WHERE NOT has_table_privilege(c.oid, used) AND (used <> 'INSERT' OR EXISTS
                (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = ANY(%s)
                    AND NOT has_column_privilege(c.oid, attnum, 'INSERT'))))
    FROM (VALUES (1)) AS one LEFT JOIN pg_namespace n ON n.nspname = %s
        LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s
"""

_CONNECTIONS = 2  # at once

_DDL_LOCK = 0x64617461_70697065  # "datapipe": one key for all DDL of ours in a database
_REMOVAL_LOCK = _DDL_LOCK + 1  # of whoever removes what is too old

_STEP_MS = 40_000  # of a removal, such as the DROP of a partition; less than `answer_within_s`

_BEGIN_DDL = f"{_BEGIN}; SELECT pg_advisory_xact_lock({_DDL_LOCK})"

_T = TypeVar("_T")


class Database(ServerSink[psycopg2.extensions.connection]):
    """Where the tables are; it need not be there yet."""

    product = "PostgreSQL"
    driver_error = psycopg2.Error
    answer_within_s = 60.0  # some hosts may have to be tried

    def __init__(self, settings: Settings, process: str, stack: AsyncExitStack) -> None:
        pool = AiopgPool(self.dsn, _CONNECTIONS)
        own = dialect(settings.database_schema)
        super().__init__(own, settings, process, pool, Loads())
        self._partitions = Partitions(own, self.run, f"{_BEGIN_DDL}; SET LOCAL timezone = 'UTC'")
        briefly = (
            f"{_BEGIN}; SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = {_STEP_MS};"
            " SET LOCAL timezone = 'UTC'"
        )
        self._retention = Retention(own, self.run, self._partitions, briefly, _REMOVAL_LOCK)
        self._data_dir = Path(settings.data_dir)
        self._stack = stack
        url = settings.database_url
        self._dsn = connection_dsn(url) if url else None
        self._psql = 'psql "$DATABASE_URL"'
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

    async def hint(self, table: str) -> str:
        """See `Sink.hint`."""
        await self.dsn()
        return f"{self._psql} -c {shlex.quote(f'SELECT * FROM {table}')}"

    # --- the driver's ---

    def verdict(self, exc: psycopg2.Error) -> Verdict:
        """See `ServerSink.verdict`."""
        return verdict(exc)

    def has_answered(self, exc: psycopg2.Error) -> bool:
        """See `ServerSink.has_answered`."""
        return has_answered(exc)

    def described(self, exc: psycopg2.Error) -> tuple[str, str]:
        """See `ServerSink.described`."""
        return reason(exc), f"SQLSTATE {exc.pgcode}" if exc.pgcode else ""

    async def begin_small(self, cursor: aiopg.Cursor) -> None:
        """See `ServerSink.begin_small`."""
        await cursor.execute(_BEGIN)

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
            await cursor.execute(_BEGIN_DDL)
            there = "SELECT 1 FROM pg_namespace WHERE nspname = %s"
            if not await fetch(cursor, there, (schema,)):
                await cursor.execute(f"CREATE SCHEMA {self._dialect.quote(schema)}")
            for statement in changes(await self._columns(cursor, table)):
                await cursor.execute(statement)
            await cursor.execute("COMMIT")

        await self.run(work, table)

    # --- upkeep ---

    async def make_partitions(self, table: Table, times: Iterable[float]) -> None:
        """See `Partitions.make`."""
        await self._partitions.make(table, times)

    async def make_ahead(self, table: Table) -> list[str]:
        """See `Upkeep.make_ahead`."""
        return await self._partitions.make_ahead(table)

    async def remove_expired(self, table: Table) -> bool:
        """See `Upkeep.remove_expired`."""
        if table.is_own:
            return await super().remove_expired(table)
        return await self._retention.remove(table)

    async def adopt(self, table: Table, say: Callable[[str], None]) -> None:
        """See `Upkeep.adopt`."""
        self._changes(table, await self.columns(table.name))  # somebody else's is none of ours
        await self._retention.adopt(table, say)

    # --- check ---

    async def _check(self, table: Table) -> list[tuple[str, str]]:
        return [*await super()._check(table), *await self._retention.findings(table)]

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
        return found

    async def denied(self, table: Table, changes: Sequence[str]) -> str | None:
        """See `SqlSink.denied`. The catalogs are open to all."""
        used = _OWN_RIGHTS if table.is_own else ["INSERT"]
        columns = [column.name for column in table.columns]
        rows = await self.query(_RIGHTS, used, columns, self._dialect.schema, table.name)
        ((role, database, schema, there, may_make, may_look, lacking),) = rows
        quote, name = self._dialect.quote, self._dialect.table(table.name)
        within, to = f"SCHEMA {quote(self._schema)}", f"TO {quote(role)}"
        why: list[str] = []
        grants: list[str] = []
        if changes and not may_make and there:
            why.append(f"lacks columns, and only its owner may add them, not {role}")
            grants += changes
        elif changes and not may_make:
            why.append(f"is missing, and {role} may not create it")
            grants.append(
                f"GRANT CREATE ON {within if schema else f'DATABASE {quote(database)}'} {to}"
            )
        if not may_look:
            why.append(f"{role} may not use its schema")
            grants.append(f"GRANT USAGE ON {within} {to}")
        if lacking:
            why.append(f"{role} has no right to {', '.join(lacking)}")
            grants.append(f"GRANT {', '.join(lacking)} ON {name} {to}")
        return f"{'; '.join(why)}: {'; '.join(grants)}" if why else None

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
