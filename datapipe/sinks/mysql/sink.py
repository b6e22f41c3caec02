"""MariaDB and MySQL as the sink: loads by LOAD DATA LOCAL, each in a thread; the pool for the rest.

What is promised needs a server that flushes at each COMMIT, and that takes a load as one
transaction. Both are settings of the server, which can change at any time, so each transaction of
ours looks at them first.
"""

from __future__ import annotations

import asyncio
import math
import re
import shlex
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import aiomysql
import msgspec
import pymysql

from datapipe import sinks
from datapipe.errors import ConfigError, LaneBlocked, SinkUnavailable
from datapipe.events.limits import Limits
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import SinkPlugin, Table
from datapipe.sinks.dialect import Dialect
from datapipe.sinks.mysql.connections import (
    LoadConnection,
    LoadSessions,
    Pool,
    address_of,
    bound,
    connected,
)
from datapipe.sinks.mysql.copy import PACKET_BYTES, Copier
from datapipe.sinks.mysql.dialect import dialect
from datapipe.sinks.mysql.errors import code_of, error_of, is_away, one_line, verdict
from datapipe.sinks.sql import Result, SqlSink, SqlTransaction, Statement
from datapipe.sinks.transaction import Entry, RefusedRow, Rows, Transaction
from datapipe.sinks.verdict import Verdict

_CONNECTIONS = 2  # of the pool, at once
_ANSWER_S = 20.0
_DEADLOCK = 1213

# (as the server has it, what is wrong) of settings that a server may have
_UNFIT = {
    "innodb_flush_log_at_trx_commit": ({"1"}, "a power cut would lose what was loaded"),
    "sync_binlog": ({"1"}, "with a binary log, a power cut would lose what was loaded"),
    "binlog_format": ({"ROW", "MIXED"}, "InnoDB refuses each load"),
    "wsrep_load_data_splitting": ({"OFF"}, "a load would not be one transaction"),
}
_SETTINGS = (*_UNFIT, "log_bin", "wsrep_on", "local_infile", "max_allowed_packet")
_READ = f"SHOW GLOBAL VARIABLES WHERE variable_name IN {_SETTINGS}"

_ENGINE = (
    "SELECT engine FROM information_schema.tables"
    " WHERE table_schema = DATABASE() AND table_name = %s AND engine <> 'InnoDB'"
)

_VERSION = re.compile(r"(?:5\.5\.5-)?([0-9.]+)")
_T = TypeVar("_T")


class MySqlSink(SqlSink):
    """A thread and a plain connection per load under way, and the pool for the rest."""

    def __init__(self, settings: Settings, process: str) -> None:
        super().__init__(dialect(), settings, process)
        self.product = "MariaDB" if settings.database_url.startswith("mariadb") else "MySQL"
        self._address = address_of(settings.database_url)
        self._schema = self._address.database
        self._pool = Pool(self._address, _CONNECTIONS)
        self._sessions = LoadSessions()
        self._threads: dict[str, int] = {}  # the server's threads of loads under way, by lane

    # --- work through the pool ---

    async def run(
        self, work: Callable[[aiomysql.Cursor], Awaitable[_T]], lane: str | None = None
    ) -> _T:
        """Do something on a pooled connection; once more on a dead one, or after a deadlock.

        Args: lane: whose work it is, if it is one lane's.
        Raises: SinkUnavailable, or LaneBlocked for what only a person can repair.
        """
        try:
            try:
                return await self._once(work)
            except pymysql.MySQLError as exc:
                if verdict(exc) is not Verdict.DOWN and code_of(exc) != _DEADLOCK:
                    raise
                return await self._once(work)
        except pymysql.MySQLError as exc:
            raise self._error(exc, lane) from exc

    async def _once(self, work: Callable[[aiomysql.Cursor], Awaitable[_T]]) -> _T:
        try:
            async with asyncio.timeout(_ANSWER_S), self._pool.cursor() as cursor:
                started = time.perf_counter()
                result = await work(cursor)
                self.answer_s = time.perf_counter() - started
        except OSError as exc:  # TimeoutError as well
            self._pool.renew()
            text = str(exc) or f"no answer in {_ANSWER_S:.0f} s"
            raise pymysql.OperationalError(2013, text) from exc
        except pymysql.MySQLError as exc:
            if verdict(exc) is Verdict.DOWN:
                self._pool.renew()
            raise
        if self.state().up is None:
            self.works(started)
        return result

    def _error(self, exc: pymysql.MySQLError, lane: str | None) -> SinkUnavailable | LaneBlocked:
        """Our error to raise for it; notes that the database is down, if that is what it means."""
        if verdict(exc) is Verdict.DOWN:
            self.down(one_line(exc))
        return error_of(exc, lane)

    async def query(self, sql: str, *values: Any, lane: str | None = None) -> list[tuple[Any, ...]]:
        """See `SqlSink.query`."""
        return await self.run(partial(_fetch, sql=sql, values=values), lane)

    async def transaction(self, *statements: Statement) -> Result:
        """See `SqlSink.transaction`."""

        async def work(cursor: aiomysql.Cursor) -> Result:
            self._is_fit(await _fetch(cursor, _READ))
            await cursor.execute("START TRANSACTION")
            for sql, values in statements:
                result = Result(await _fetch(cursor, sql, values), cursor.rowcount)
            await cursor.execute("COMMIT")
            return result

        return await self.run(work)

    def _is_fit(self, settings: Iterable[tuple[str, str]]) -> None:
        """Raises: SinkUnavailable: with these settings the server breaks what we promise."""
        if wrong := _unfit(dict(settings)):
            self.down(wrong[0])
            raise SinkUnavailable(wrong[0])

    # --- tables ---

    async def read_version(self) -> str:
        """See `SqlSink.read_version`."""
        ((version,),) = await self.query("SELECT VERSION()")
        self.product = "MariaDB" if "MariaDB" in version else "MySQL"
        found = _VERSION.match(version)
        return found[1] if found else str(version)

    async def columns(self, table: str) -> set[str] | None:
        """See `SqlSink.columns`. Raises: LaneBlocked, too: the table is not InnoDB's."""
        return await self.run(partial(_columns, table=table), table)

    async def define(self, table: str, changes: Callable[[set[str] | None], Sequence[str]]) -> None:
        """See `SqlSink.define`. DDL commits at once; of two processes one waits for the other."""
        name = f"datapipe {self._address.database}"[:64]

        async def work(cursor: aiomysql.Cursor) -> None:
            if await _fetch(cursor, "SELECT GET_LOCK(%s, 5)", (name,)) != [(1,)]:
                raise SinkUnavailable("another process makes tables now", everywhere=False)
            for statement in changes(await _columns(cursor, table)):
                await cursor.execute(statement)
            await cursor.execute("DO RELEASE_LOCK(%s)", (name,))

        await self.run(work, table)

    # --- loads ---

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        """See `TransactionalSink.transact`."""

        def whole(connection: LoadConnection) -> _T:
            self._threads[lane] = connection.thread_id()
            self._is_fit(connection.rows(_READ))
            connection.query("START TRANSACTION")
            result = work(MySqlTransaction(connection, self._dialect, self._process))
            connection.query("COMMIT")
            return result

        try:
            return await self._sessions.run(partial(connected, self._address), whole)
        except pymysql.MySQLError as exc:
            raise self._error(exc, lane) from exc
        finally:
            self._threads.pop(lane, None)

    async def waits(self) -> dict[str, str]:
        """See `Sink.waits`: for locks of tables; the server does not say for which rows."""
        lanes = {thread: lane for lane, thread in self._threads.items()}
        rows = await self.query(
            "SELECT id, state FROM information_schema.processlist"
            " WHERE id IN %s AND state LIKE 'Waiting for%%'",
            self._dialect.listed(list(lanes)),
        )
        return {lanes[thread]: state for thread, state in rows}

    def down(self, error: str) -> None:
        """See `TransactionalSink.down`."""
        super().down(error)
        self._sessions.close_idle()

    def abort(self) -> None:
        """See `Sink.abort`."""
        self._sessions.abort()

    async def close(self) -> None:
        await self._sessions.close()
        self._pool.renew()

    # --- check ---

    async def hint(self) -> str:
        """See `Sink.hint`."""
        at = self._address
        password = " -p" if at.password else ""
        to = f"-h {at.host} -P {at.port} -u {shlex.quote(at.user)}{password}"
        sql = shlex.quote("SELECT * FROM crash_report")
        return f"{self.product.lower()} {to} {shlex.quote(at.database)} -e {sql}"

    def is_away(self, exc: BaseException | None) -> bool:
        """See `SqlSink.is_away`."""
        return is_away(exc)

    async def findings(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `SqlSink.findings`."""
        settings = dict(await self.query(_READ))
        found = [("fail", f"database: {each}") for each in _unfit(settings)]
        if settings["local_infile"] != "ON":
            text = "local_infile is OFF: no load can work; set it to ON in the server's settings"
            found.append(("fail", f"database: {text}"))
        if int(settings["max_allowed_packet"]) < 16 * PACKET_BYTES:
            text = f"max_allowed_packet is {settings['max_allowed_packet']}: set 16M or more"
            found.append(("fail", f"database: {text}"))
        if self.product == "MySQL":
            found.append(("warn", "database: MySQL is untested; MariaDB is not"))
        elif [int(part) for part in (self.version or "").split(".")[:2]] < [10, 6]:
            found.append(("fail", "database: MariaDB 10.6 is the oldest that works"))
        return found


class MySqlTransaction(SqlTransaction):
    """A `Transaction` that a connection has begun."""

    def __init__(self, connection: LoadConnection, dialect: Dialect, process: str) -> None:
        super().__init__(dialect, process)
        self._connection = connection

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """See `SqlTransaction.query`."""
        return self._connection.rows(sql, *values)

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """See `SqlTransaction.many`."""
        with self._connection.cursor() as cursor:
            cursor.executemany(sql, rows)

    def enter(
        self,
        kind: str,
        entries: Sequence[Entry],
        lane: str | None = None,
        load: str | None = None,
        not_after: float = math.inf,
    ) -> set[str]:
        """See `Transaction.enter`. A frozen process's session is ended: see `connections`."""
        ours = load or uuid4().hex
        until = [] if not_after == math.inf else [not_after]
        fence = f" WHERE {self._dialect.clock} < {self._dialect.at.format('%s')}" if until else ""
        self.query(
            f"INSERT INTO {self._ledger}"
            " (segment, kind, lane, events, source, body, process, `load`)"
            " SELECT e.id, %s, %s, e.events, e.source, e.body, %s, %s"
            " FROM JSON_TABLE(%s, '$[*]' COLUMNS (id VARCHAR(191) PATH '$[0]',"
            " events BIGINT PATH '$[1]', source VARCHAR(255) PATH '$[2]',"
            f" body VARCHAR(255) PATH '$[3]')) AS e{fence}"
            f" ON DUPLICATE KEY UPDATE segment = {self._ledger}.segment",
            kind, lane, self._process, ours, msgspec.json.encode(entries).decode(), *until,
        )  # fmt: skip
        if self._connection.affected_rows() == len(entries):  # most of the time
            return {entry.id for entry in entries}
        rows = self.query(
            f"SELECT segment FROM {self._ledger} WHERE segment {self._one_of} AND `load` = %s",
            self._dialect.listed([entry.id for entry in entries]), ours,
        )  # fmt: skip
        return {id for (id,) in rows}

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        """See `Transaction.copy`. Raises: LaneBlocked: the table has another engine."""
        if engine := self.query(_ENGINE, table.name):
            raise LaneBlocked(_other_engine(engine[0][0]))
        return Copier(self._connection, self._dialect, table.name, columns).copy(rows)


def _unfit(settings: Mapping[str, str]) -> list[str]:
    """What is wrong with the server's settings, and what to set."""
    needless = set()
    if settings.get("log_bin") == "OFF":
        needless |= {"sync_binlog", "binlog_format"}
    if settings.get("wsrep_on", "OFF") == "OFF":
        needless |= {"wsrep_load_data_splitting"}
    return [
        f"{name} is {settings[name]}: {why}; set it to {max(wanted)}"
        for name, (wanted, why) in _UNFIT.items()
        if name in settings and name not in needless and settings[name] not in wanted
    ]


def _other_engine(engine: str) -> str:
    return f"its engine is {engine}, which rolls nothing back: ALTER TABLE ... ENGINE = InnoDB"


async def _columns(cursor: aiomysql.Cursor, table: str) -> set[str] | None:
    if engine := await _fetch(cursor, _ENGINE, (table,)):
        raise LaneBlocked(_other_engine(engine[0][0]))
    sql = "SELECT column_name FROM information_schema.columns"
    there = f"{sql} WHERE table_schema = DATABASE() AND table_name = %s"
    return {name for (name,) in await _fetch(cursor, there, (table,))} or None


async def _fetch(
    cursor: aiomysql.Cursor, sql: str, values: Sequence[Any] = ()
) -> list[tuple[Any, ...]]:
    """The rows of a statement; of one without rows, none."""
    await cursor.execute(bound(sql, values))
    return list(await cursor.fetchall()) if cursor.description else []


class MysqlPlugin(SinkPlugin):
    # Source: MariaDB documentation, "DECIMAL", "Identifier Names"; its json_lib.h,
    # JSON_DEPTH_LIMIT, which counts one more
    limits = Limits(
        whole_digits=35,
        decimal_digits=30,
        beyond_years=False,
        json_depth=31,
        reserved=frozenset(),
        name_bytes=64,
        last_character="\uffff",
        ignores_case=True,
    )

    def faults(self, settings: Settings) -> Iterator[tuple[str, str]]:
        """See `Plugin.faults`."""
        yield from super().faults(settings)
        try:
            address_of(settings.database_url)
        except ConfigError as exc:
            yield "database_url", str(exc)

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[sinks.Database]:
        """See `SinkPlugin.open`."""
        sink = MySqlSink(settings, process)
        try:
            yield sink
        finally:
            await sink.close()
