"""The database as all but the loads see it: where it is, whether it is up, DDL, housekeeping.

All of this goes through aiopg, on a few connections that are kept. They are dead after a restart of
the server and may say so only when used, so a failure of the connection is tried once more on a new
one.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiopg
import psycopg2
import psycopg2.extensions
import structlog

from datapipe.errors import ConfigError, LaneBlocked, SinkUnavailable
from datapipe.health import Health
from datapipe.settings import Settings
from datapipe.sinks import Beat, Heartbeat, SinkState, Table
from datapipe.sinks.postgres.ddl import (
    DDL_LOCK,
    OWN_TABLES,
    add_columns,
    create_indexes,
    create_table,
    quote,
)
from datapipe.sinks.postgres.errors import Verdict, error_of, is_away, one_line, verdict
from datapipe.sinks.postgres.threads import in_thread

# Source: PostgreSQL documentation, libpq "Parameter Key Words". Seconds, and milliseconds for the
# last: a peer that vanished without a word is noticed.
_CONNECTION = {
    "connect_timeout": "10",
    "application_name": "datapipe",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}

# Each transaction of ours begins with these. A host that loses power says nothing, and the server
# waits for two hours, by the kernel's default, while the dead session holds its locks: so it is
# told to give up after 20 s, about as we do. By SQL, for a pooler refuses `options` at the start,
# and a URL may bring its own; not SET LOCAL, so that idle sessions end, too; over a socket file
# they do nothing. Source: PostgreSQL documentation, "Connections and Authentication", "TCP
# Settings". Seconds, and milliseconds for the fourth.
PEER_MAY_VANISH = (
    "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 3;"
    " SET tcp_keepalives_count = 3; SET tcp_user_timeout = 20000;"
    " SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL statement_timeout = 0;"
)

# Nothing that is done here need wait for a synchronous standby, which may be away for hours: DDL is
# repeated where it is missing, a heartbeat comes every 5 s, ledger rows that come back are met by
# nothing. A load's own COMMIT waits for all that was written before it.
_BEGIN = (
    f"BEGIN; {PEER_MAY_VANISH} SET LOCAL lock_timeout = '5s'; SET LOCAL synchronous_commit = local"
)

# An IronMQ message lives 30 days at the most, so its segment's ledger row must live longer.
_IRONMQ_DAYS = 31

# What others wait for is told by their last heartbeat, which may be some seconds old.
_BEAT_SLACK_S = 15.0

_CONNECTIONS = 2  # at once

_T = TypeVar("_T")
log = structlog.stdlib.get_logger("datapipe.sinks.postgres.sink")


def connection_dsn(url: str) -> str:
    """The libpq string of a database URL; what the URL itself says stands.

    On a Heroku dyno TLS is a must: what is between it and its database is anybody's network.

    Raises: ConfigError: the URL can't be read; what it says is not repeated, it holds a password.
    """
    try:
        given = psycopg2.extensions.parse_dsn(url)
    except psycopg2.Error:
        raise ConfigError("database_url: can't be read as a PostgreSQL URL") from None
    tls = {"sslmode": os.environ.get("PGSSLMODE") or "require"} if os.environ.get("DYNO") else {}
    # whatever the encoding of the database: only UTF8 holds all that clients can send
    utf8 = {"client_encoding": "UTF8"}
    dsn: str = psycopg2.extensions.make_dsn(**{**_CONNECTION, **tls, **given, **utf8})
    return dsn


class _Places:
    """Descriptors that are open all the time, for sockets to be put in their places.

    Taken early they have small numbers: when a connection breaks, aiopg calls `select`, which
    refuses those from 1,024 on.
    """

    def __init__(self, count: int) -> None:
        self._nothing = os.open(os.devnull, os.O_RDONLY)
        self._free = [os.dup(self._nothing) for _ in range(count)]

    def take(self, descriptor: int) -> int:
        """The number under which a duplicate of it is open now."""
        return os.dup2(descriptor, self._free.pop(), inheritable=False)

    def leave(self, number: int) -> None:
        """Close what is open under that number; it stays ours."""
        os.dup2(self._nothing, number, inheritable=False)
        self._free.append(number)

    def close(self) -> None:
        for descriptor in (self._nothing, *self._free):
            os.close(descriptor)


class _Cancelled(psycopg2.OperationalError):  # type: ignore[misc]
    """The server cancelled the statement: `statement_timeout`, or somebody's `pg_cancel_backend`.

    Of psycopg2's own error aiopg makes an `asyncio.CancelledError`, which would end the task.
    """

    pgcode = "57014"


class _Connection(psycopg2.extensions.connection):  # type: ignore[misc]
    """A connection of the pool; the event loop watches a duplicate of its socket.

    libpq closes the socket itself when the connection breaks, while aiopg still has it on the loop.
    Whatever is opened next, in any thread, gets the same number, and uvloop, which keeps a handle
    for each number, then fails who watches it. The duplicate's number is ours until the loop has
    forgotten it. (Source: uvloop, `handles/poll.pyx`: `_fatal_error` closes a handle that
    `Loop._polls` still holds.)
    """

    _watched = -1

    def __init__(self, places: _Places, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loop = asyncio.get_running_loop()
        self._places = places
        self._watched = places.take(super().fileno())

    def fileno(self) -> int:
        """What aiopg asks for once, to have it watched."""
        return self._watched

    def poll(self) -> int:
        """See psycopg2. aiopg calls it when there is something to read or write."""
        try:
            state: int = super().poll()
        except psycopg2.extensions.QueryCanceledError as exc:
            raise _Cancelled(one_line(exc)) from exc
        except psycopg2.Error:
            if self._watched >= 0 and (self.closed or super().fileno() < 0):
                self._unwatch()  # the duplicate would be ready to read for ever
            raise
        return state

    def close(self) -> None:
        super().close()
        if self._watched >= 0:
            self._unwatch()
            self._places.leave(self._watched)
            self._watched = -1

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._watched)
        self._loop.remove_writer(self._watched)


class _Pool:
    """Connections to one address.

    One that fails is closed alone. aiopg's own pool would wake nobody who waits for its place, and
    ends the work of others when it is terminated.
    """

    def __init__(self, dsn: str, places: _Places) -> None:
        self._dsn = dsn
        self._places = places
        self._free: list[aiopg.Connection] = []
        self._closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[aiopg.Connection]:
        """One that is free, or a new one. After an error it is not used again.

        Raises: psycopg2.Error, TimeoutError.
        """
        connection = self._take() or await aiopg.connect(
            self._dsn, timeout=20.0, enable_json=False, enable_hstore=False, enable_uuid=False,
            connection_factory=partial(_Connection, self._places),
        )  # fmt: skip
        try:
            yield connection
        except BaseException:
            connection.raw.close()
            raise
        if self._closed:
            connection.raw.close()
        else:
            self._free.append(connection)

    def _take(self) -> aiopg.Connection | None:
        while self._free:
            connection = self._free.pop()
            if not connection.closed:
                return connection
            connection.raw.close()  # it broke while nobody used it
        return None

    def close(self) -> None:
        """Close those that are free, and the others as soon as they are."""
        self._closed = True
        for connection in self._free:
            connection.raw.close()
        self._free.clear()


def _answering(dsn: str) -> str:
    """The same, with the one address that answers of those that it names. Blocks.

    Raises: psycopg2.Error: none does.
    """
    connection = psycopg2.connect(dsn)
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            if end.family == socket.AF_UNIX:
                return dsn
            address, port = end.getpeername()[:2]
        host = connection.info.host
        pinned: str = psycopg2.extensions.make_dsn(dsn, host=host, hostaddr=address, port=port)
    finally:
        connection.close()
    return pinned


@asynccontextmanager
async def _transaction(cursor: aiopg.Cursor) -> AsyncIterator[None]:
    """A transaction of housekeeping, on a pooled connection, which an error closes."""
    await cursor.execute(_BEGIN)
    yield
    await cursor.execute("COMMIT")


class Database:
    """Where the tables are; it need not be there yet."""

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self._settings = settings
        self._schema = settings.database_schema
        self._ledger = self._own("datapipe_ledger")
        self._processes = self._own("datapipe_processes")
        self._stack = stack
        url = settings.database_url
        self._dsn = connection_dsn(url) if url else None
        self.psql: str | None = None  # a line that opens the embedded server
        self._pool: _Pool | None = None
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._places = _Places(_CONNECTIONS)
        stack.callback(self._places.close)
        self._starting = asyncio.Lock()
        self._preparing = asyncio.Lock()
        self._prepared: set[Table] = set()
        self._health = Health()
        self._version: str | None = None
        self._answer_s: float | None = None

    def _name(self, table: str) -> str:
        return f"{quote(self._schema)}.{quote(table)}"

    def _own(self, table: str) -> str:
        """The name in a statement with parameters, be there none: psycopg2 looks at each `%`."""
        return self._name(table).replace("%", "%%")

    async def dsn(self) -> str:
        """The libpq connection string; starts the embedded server where that is meant.

        Raises: SinkUnavailable: it does not start.
        """
        async with self._starting:
            if self._dsn is None:
                from datapipe.sinks.postgres.embedded import embedded_postgres

                server = await self._stack.enter_async_context(
                    embedded_postgres(Path(self._settings.data_dir))
                )
                self.psql = server.psql
                self._dsn = connection_dsn(server.url)
            return self._dsn

    # --- up or down ---

    def works(self, began: float) -> None:
        """Note that real work succeeded, which began then (`time.perf_counter`).

        What began before the last failure tells nothing: the server may have ended since. Nor does
        what only read, once it was down: a standby, or a full disk, lets us read.
        """
        if self._health.works(began):
            log.info("database up", version=self._version, schema=self._schema)

    def failed(self, exc: psycopg2.Error) -> None:
        """Note an error; only one of the connection means that the database is down."""
        if verdict(exc) is Verdict.DOWN:
            self.down(one_line(exc))

    def down(self, error: str) -> None:
        """Note that the database does not answer, or not as it should."""
        if self._health.fails(time.perf_counter(), error):
            log.error("database down", error=error)

    def state(self) -> SinkState:
        health = self._health
        return SinkState(health.up, health.error, self._version, self._schema, self._answer_s)

    async def hint(self) -> str:
        """See `Sink.hint`."""
        await self.dsn()
        psql = self.psql or 'psql "$DATABASE_URL"'
        return f"{psql} -c {shlex.quote('SELECT * FROM crash_report')}"

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `Sink.check`."""
        try:
            await self.run(self._read_version)
            found = [("ok", f"database: PostgreSQL {self._version}, schema {self._schema}")]
            found += await self.run(self._check_encoding)
            for table in (*OWN_TABLES, *tables):
                found += await self.run(partial(self._check, table=table))
        except (SinkUnavailable, LaneBlocked) as exc:
            return [("away" if is_away(exc.__cause__) else "fail", f"database: {exc}")]
        return found

    async def _check_encoding(self, cursor: aiopg.Cursor) -> list[tuple[str, str]]:
        await cursor.execute("SHOW server_encoding")
        (encoding,) = await cursor.fetchone()
        if encoding == "UTF8":
            return []
        text = "events with text that it lacks become dead letters; UTF8 holds all"
        return [("warn", f"database: its encoding is {encoding}: {text}")]

    async def _check(self, cursor: aiopg.Cursor, table: Table) -> list[tuple[str, str]]:
        lacking = await self._lacking(cursor, table)
        if lacking:
            if wanting := await self._wanting(cursor, table):
                return [("fail", f"table {table.name}: {wanting}")]
            return [("ok", f"table {table.name}: will be made or completed when it is needed")]
        await cursor.execute(
            "SELECT relpersistence = 'u' FROM pg_class WHERE oid = %s::regclass",
            (self._name(table.name),),
        )
        if (await cursor.fetchone())[0]:
            text = "is UNLOGGED: a crash of the database empties it, rows and all"
            return [("warn", f"table {table.name}: {text}")]
        return []

    async def _wanting(self, cursor: aiopg.Cursor, table: Table) -> str | None:
        """The right that our role lacks to make or complete this table, and the remedy."""
        await cursor.execute(
            "SELECT current_user::text, current_database()::text, n.oid IS NULL, c.oid IS NULL,"
            " CASE WHEN n.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')"
            " WHEN c.oid IS NULL THEN has_schema_privilege(n.oid, 'CREATE')"
            " ELSE pg_has_role(c.relowner, 'USAGE') END"
            " FROM (VALUES (1)) AS one LEFT JOIN pg_namespace n ON n.nspname = %s"
            " LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s",
            (self._schema, table.name),
        )
        role, database, no_schema, no_table, may = await cursor.fetchone()
        if may:
            return None
        if not no_table:
            return f"lacks columns, and only its owner may add them, not {role}"
        within = f"DATABASE {quote(database)}" if no_schema else f"SCHEMA {quote(self._schema)}"
        return f"is missing, and {role} may not make it: GRANT CREATE ON {within} TO {quote(role)}"

    async def _read_version(self, cursor: aiopg.Cursor) -> None:
        if self._version is None:
            await cursor.execute("SHOW server_version")
            self._version = (await cursor.fetchone())[0].split(" ")[0]

    # --- work through the pool ---

    async def run(
        self, work: Callable[[aiopg.Cursor], Awaitable[_T]], lane: str | None = None
    ) -> _T:
        """Do something on a pooled connection, in autocommit; on a dead one, once more.

        Args: lane: whose work it is, if it is one lane's.
        Raises: SinkUnavailable, or LaneBlocked for what only a person can mend.
        """
        for again in (False, True):
            try:
                return await self._run_once(work)
            except (TimeoutError, psycopg2.Error, OSError) as exc:
                if not isinstance(exc, psycopg2.Error):
                    exc = psycopg2.OperationalError(one_line(exc))
                down = verdict(exc) is Verdict.DOWN
                if down:
                    self._close_pool()
                if again or not down:
                    self.failed(exc)
                    raise error_of(exc, lane) from exc
            except SinkUnavailable as exc:
                self.down(str(exc))
                raise
        raise AssertionError  # the second pass returns or raises

    async def _run_once(self, work: Callable[[aiopg.Cursor], Awaitable[_T]]) -> _T:
        async with self._turns:
            began = time.perf_counter()
            pool = await self._open_pool()
            async with pool.connection() as connection, connection.cursor() as cursor:
                started = time.perf_counter()
                result = await work(cursor)
                self._answer_s = time.perf_counter() - started
        if self._health.up is None:
            self.works(began)
        return result

    async def _open_pool(self) -> _Pool:
        if self._pool is None:
            # libpq changes its socket from one address to the next while aiopg watches the first:
            # so the pool is given the one that answers
            configured = await self.dsn()
            _, answering = in_thread(lambda: _answering(configured))
            dsn = await answering
            # somebody else may have been faster
            self._pool = self._pool or _Pool(dsn, self._places)
        return self._pool

    def _close_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    # --- DDL ---

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
        if not await self._lacking(cursor, table):
            return  # nothing to do, and no lock taken
        async with _transaction(cursor):
            await cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            for statement in await self._lacking(cursor, table):
                await cursor.execute(statement)

    async def _lacking(self, cursor: aiopg.Cursor, table: Table) -> list[str]:
        """The statements that would make the table as it should be."""
        await cursor.execute(
            "SELECT n.oid, c.relkind, array_agg(a.attname::text)"
            " FROM pg_namespace n"
            " LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s"
            " LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND attnum > 0 AND NOT attisdropped"
            " WHERE n.nspname = %s GROUP BY n.oid, c.relkind",
            (table.name, self._schema),
        )
        found = await cursor.fetchone()
        statements = [] if found else [f"CREATE SCHEMA {quote(self._schema)}"]
        if not found or found[1] is None:
            return [
                *statements,
                create_table(self._schema, table),
                *create_indexes(self._schema, table),
            ]
        missing = [column for column in table.columns if column.name not in found[2]]
        return [add_columns(self._schema, table, missing)] if missing else []

    # --- housekeeping ---

    async def keep_house(self, beat: Heartbeat, removed: Sequence[str]) -> dict[str, Beat]:
        """See `Sink.keep_house`. Raises: SinkUnavailable, LaneBlocked."""
        await self.prepare(OWN_TABLES[0])
        began = time.perf_counter()

        async def keep(cursor: aiopg.Cursor) -> dict[str, Beat]:
            async with _transaction(cursor):
                return await self._keep_house(cursor, beat, removed)

        beats = await self.run(keep)
        self.works(began)
        return beats

    async def _keep_house(
        self, cursor: aiopg.Cursor, beat: Heartbeat, removed: Sequence[str]
    ) -> dict[str, Beat]:
        await cursor.execute(
            f"INSERT INTO {self._processes}"
            " (process, mirror, oldest_waiting, ended, beats)"
            " VALUES (%s, %s, to_timestamp(%s), %s, 1) ON CONFLICT (process) DO UPDATE SET"
            " seen_at = now(), beats = datapipe_processes.beats + 1, ended = excluded.ended,"
            " oldest_waiting = excluded.oldest_waiting",
            (beat.process, beat.mirror, beat.oldest_waiting, beat.ended),
        )
        if removed:
            await cursor.execute(
                f"DELETE FROM {self._ledger} WHERE segment = ANY(%s)", (list(removed),)
            )
        # Keys stay while a segment that was accepted within their window still waits anywhere,
        # also in the mirror of a process that is gone: it could hold the same event again.
        await cursor.execute(
            f"DELETE FROM {self._ledger} WHERE kind IN ('claim', 'part') AND loaded_at <"
            f" (SELECT least(now(), min(oldest_waiting)) FROM {self._processes})"
            " - make_interval(secs => %s)",
            (self._settings.dedupe_window + _BEAT_SLACK_S,),
        )
        await cursor.execute(
            f"DELETE FROM {self._ledger} WHERE kind = 'segment' AND source = 'ironmq'"
            f" AND loaded_at < now() - interval '{_IRONMQ_DAYS} days'",
            (),
        )
        await cursor.execute(
            f"DELETE FROM {self._processes} WHERE seen_at < now() - interval"
            f" '{_IRONMQ_DAYS} days' OR (oldest_waiting IS NULL AND seen_at < now() - interval"
            " '1 hour') OR (mirror = %s AND process <> %s)",
            (beat.mirror, beat.process),
        )
        await cursor.execute(f"SELECT process, beats, ended FROM {self._processes}", ())
        return {process: Beat(beats, ended) for process, beats, ended in await cursor.fetchall()}

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """See `Sink.loaded`. Raises: SinkUnavailable, LaneBlocked."""

        async def look(cursor: Any) -> set[str]:
            await cursor.execute(
                f"SELECT segment FROM {self._ledger} WHERE segment = ANY(%s)", (list(segments),)
            )
            return {segment for (segment,) in await cursor.fetchall()}

        return await self.run(look)

    async def forget_source(self, source: str, process: str) -> None:
        """See `Sink.forget_source`. Raises: SinkUnavailable, LaneBlocked."""

        async def forget(cursor: Any) -> None:
            async with _transaction(cursor):
                for where in (f"{self._ledger} WHERE source", f"{self._processes} WHERE mirror"):
                    statement = f"DELETE FROM {where} = %s AND process <> %s"
                    await cursor.execute(statement, (source, process))

        await self.run(forget)
