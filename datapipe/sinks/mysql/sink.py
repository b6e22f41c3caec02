"""MariaDB and MySQL as the sink: loads by LOAD DATA LOCAL, each in a thread; the pool for the rest.

What is promised needs a server that flushes at each COMMIT, and that takes a load as one
transaction. Both are settings of the server, which can change at any time, so each transaction of
ours looks at them first.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
import pymysql

from datapipe import sinks
from datapipe.errors import ConfigError, LaneBlocked, SinkUnavailable
from datapipe.events.limits import Limits
from datapipe.events.types import Column
from datapipe.health import Wait
from datapipe.settings import Settings
from datapipe.sinks import SinkPlugin, Table
from datapipe.sinks.dialect import Dialect
from datapipe.sinks.mysql import connections
from datapipe.sinks.mysql.connections import PACKET_BYTES, LoadConnection, LoadSessions, SmallPool
from datapipe.sinks.mysql.copy import Copier
from datapipe.sinks.mysql.dialect import dialect
from datapipe.sinks.mysql.errors import code_of, described, has_answered, is_away, verdict
from datapipe.sinks.server import ServerSink, fetch
from datapipe.sinks.sql_tables import Statement
from datapipe.sinks.sql_transaction import SqlTransaction, sliced
from datapipe.sinks.transaction import Entry, RefusedRow, Rows, Transaction
from datapipe.sinks.urls import login_fault, server_address

_PORT = 3306
_CONNECTIONS = 2  # of the pool, at once
_DEADLOCK = 1213

# What a setting of the server may be, and why not something else.
_FIT = {
    "innodb_flush_log_at_trx_commit": (("1",), "a power cut would lose what was loaded"),
    "sync_binlog": (("1",), "with a binary log, a power cut would lose what was loaded"),
    "binlog_format": (("ROW", "MIXED"), "InnoDB refuses each load"),
    "wsrep_load_data_splitting": (("OFF",), "a load would not be one transaction"),
}
_SETTINGS = (
    "SHOW GLOBAL VARIABLES WHERE variable_name IN"
    f" {(*_FIT, 'log_bin', 'wsrep_on', 'local_infile', 'max_allowed_packet')}"
)

_FOR_DDL = {
    "CREATE TABLE": ("CREATE",), "CREATE INDEX": ("INDEX",), "ALTER TABLE": ("ALTER", "CREATE"),
}  # fmt: skip
_GRANT = re.compile(r"GRANT (.+) ON (\*|`(?:[^`]|``)+`)\.(\*|`(?:[^`]|``)+`) TO ")

_LOOK = "SELECT segment FROM datapipe_ledger"
_DELETE = (
    "DELETE datapipe_ledger FROM JSON_TABLE(%s, '$[*]' COLUMNS"
    " (id VARCHAR(191) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$')) AS found"
    " STRAIGHT_JOIN datapipe_ledger FORCE INDEX (PRIMARY) ON datapipe_ledger.segment = found.id"
)

_ENGINE = (
    "SELECT engine FROM information_schema.tables"
    " WHERE table_schema = DATABASE() AND table_name = %s AND engine <> 'InnoDB'"
)


class MySqlSink(ServerSink[LoadConnection]):
    """See `connections`."""

    driver_error = pymysql.MySQLError
    verdict = staticmethod(verdict)
    described = staticmethod(described)
    has_answered = staticmethod(has_answered)
    is_away = staticmethod(is_away)

    def __init__(self, settings: Settings, process: str) -> None:
        self._address = at = server_address(settings.database_url, _PORT)
        pool = SmallPool(at, _CONNECTIONS)
        super().__init__(dialect(), settings, process, pool, LoadSessions())
        self.product = "MariaDB" if settings.sink_kind == "mariadb" else "MySQL"
        self._schema = at.database

    def is_worth_repeating(self, exc: Exception, left: int) -> bool:
        """See `ServerSink.is_worth_repeating`. Heartbeats look at each other's rows: deadlocks."""
        return super().is_worth_repeating(exc, left) or code_of(exc) == _DEADLOCK

    async def begin_small(self, cursor: Any) -> None:
        """See `ServerSink.begin_small`."""
        self._must_fit(await fetch(cursor, _SETTINGS))
        await cursor.execute("START TRANSACTION")

    def connected(self) -> LoadConnection:
        """See `ServerSink.connected`."""
        return connections.connected(self._address)

    def begin(self, connection: LoadConnection) -> tuple[int, Transaction]:
        """See `ServerSink.begin`."""
        self._must_fit(connection.rows(_SETTINGS))
        connection.query("START TRANSACTION")
        transaction = MySqlTransaction(connection, self._dialect, self._process)
        return connection.thread_id(), transaction

    def commit(self, connection: LoadConnection) -> None:
        """See `ServerSink.commit`."""
        connection.query("COMMIT")

    def _must_fit(self, settings: Iterable[Any]) -> None:
        """Raises: SinkUnavailable: with these settings the server breaks what we promise."""
        if wrong := _unfit(dict(settings)):
            self.down(wrong[0], refuses=True)
            raise SinkUnavailable(wrong[0])

    async def waits(self) -> dict[str, Wait]:
        """See `Sink.waits`: for locks of tables; the server does not say for which rows."""
        lanes = {thread: lane for lane, thread in self._backends.items()}
        rows = await self.query(
            "SELECT id, state FROM information_schema.processlist"
            " WHERE id IN %s AND state LIKE 'Waiting for%%'",
            self._dialect.listed(list(lanes)),
        )
        return {lanes[thread]: Wait(state) for thread, state in rows}

    async def forget(self, *conditions: Statement) -> None:
        """See `SqlSink.forget`. A DELETE waits for each row under way that it passes, in
        a small ledger for all: so rows are looked for without locks, and deleted by their keys.
        """
        for sql, values in conditions:
            rows = (await self._own((f"{_LOOK} WHERE {sql}", values))).rows
            for some in sliced([id for (id,) in rows]):
                ids = msgspec.json.encode(some).decode()
                await self._own((f"{_DELETE} WHERE {sql}", (ids, *values)))

    # --- tables ---

    async def read_version(self) -> str:
        """See `SqlSink.read_version`."""
        ((version,),) = await self.query("SELECT VERSION()")
        self.product = "MariaDB" if "MariaDB" in version else "MySQL"
        return str(version).removeprefix("5.5.5-").split("-")[0]

    async def columns(self, table: str) -> set[str] | None:
        """See `SqlSink.columns`. Raises: LaneBlocked, too: the table is not InnoDB's."""
        return await self.run(partial(_columns, table=table), table)

    async def define(self, table: str, changes: Callable[[set[str] | None], Sequence[str]]) -> None:
        """See `SqlSink.define`. DDL commits at once; of two processes one waits for the other."""
        name = f"datapipe {self._address.database}"[:64]

        async def work(cursor: Any) -> None:
            if await fetch(cursor, "SELECT GET_LOCK(%s, 5)", (name,)) != [(1,)]:
                raise SinkUnavailable("another process makes tables now", everywhere=False)
            for statement in changes(await _columns(cursor, table)):
                await cursor.execute(statement)
            await cursor.execute("DO RELEASE_LOCK(%s)", (name,))

        await self.run(work, table)

    # --- check ---

    async def hint(self, table: str) -> str:
        """See `Sink.hint`."""
        at = self._address
        to = f"-h {at.host} -P {at.port} -u {shlex.quote(at.user)}{' -p' if at.password else ''}"
        return f"{self.product.lower()} {to} {shlex.quote(at.database)} -e 'SELECT * FROM {table}'"

    async def findings(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `SqlSink.findings`."""
        settings = dict(await self.query(_SETTINGS))
        found = [("fail", f"database: {each}") for each in _unfit(settings)]
        if settings["local_infile"] != "ON":
            text = "local_infile is OFF: no load can work; set it to ON in the server's settings"
            found.append(("fail", f"database: {text}"))
        if int(settings["max_allowed_packet"]) < 16 * PACKET_BYTES:
            text = f"max_allowed_packet is {settings['max_allowed_packet']}: set 16M or more"
            found.append(("fail", f"database: {text}"))
        if self.product == "MySQL":
            found.append(("warn", "database: MySQL is untested, MariaDB is not"))
        elif [int(part) for part in (self.version or "").split(".")[:2]] < [10, 6]:
            found.append(("fail", "database: MariaDB 10.6 is the oldest that works"))
        return found

    async def denied(self, table: Table, changes: Sequence[str]) -> str | None:
        """See `SqlSink.denied`: by what the server says of our account and its active roles."""
        at = self._address
        lacking = {"SELECT", "INSERT", "UPDATE", "DELETE"} if table.is_own else {"INSERT"}
        lacking |= {right for each in changes for right in _FOR_DDL[" ".join(each.split()[:2])]}
        ((account,),) = await self.query("SELECT CURRENT_USER()")
        for (line,) in await self.query("SHOW GRANTS"):
            if found := _GRANT.match(line):
                given, database, name = (each.replace("`", "") for each in found.groups())
                ((is_here,),) = await self.query("SELECT %s LIKE %s", at.database, database)
                if (is_here or database == "*") and name in ("*", table.name):
                    lacking -= lacking if given.startswith("ALL PRIV") else set(given.split(", "))
        if not lacking:
            return None
        rights, to = ", ".join(sorted(lacking)), "@".join(f"'{x}'" for x in account.rsplit("@", 1))
        on = f"{self._dialect.quote(at.database)}.{self._dialect.table(table.name)}"
        return f"{account} has no right to {rights}: GRANT {rights} ON {on} TO {to}"


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
        """See `Transaction.enter`. A frozen process's session is ended: see `connections`.

        What is ours is looked up, not counted: a proxy between may have set CLIENT_FOUND_ROWS (for
        ProxySQL that is the default), by which rows that were there count as well.
        """
        ours = load or uuid4().hex
        new: set[str] = set()
        for some in sliced(entries):
            self._insert(kind, some, lane, ours, not_after)
            rows = self.query(
                f"SELECT segment FROM {self._ledger} WHERE segment {self._one_of} AND `load` = %s",
                self._dialect.listed([entry.id for entry in some]), ours,
            )  # fmt: skip
            new.update(id for (id,) in rows)
        return new

    def _insert(
        self, kind: str, entries: Sequence[Entry], lane: str | None, load: str, not_after: float
    ) -> None:
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
            kind, lane, self._process, load, msgspec.json.encode(entries).decode(), *until,
        )  # fmt: skip

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        """See `Transaction.copy`. Raises: LaneBlocked: the table has another engine."""
        if engine := self.query(_ENGINE, table.name):
            raise _other_engine(table.name, engine[0][0])
        return Copier(self._connection, self._dialect, table.name, columns).copy(rows)


def _unfit(settings: Mapping[str, str]) -> list[str]:
    """What is wrong with the server's settings, and what to set."""
    ignored = set()
    if settings.get("log_bin") == "OFF":
        ignored |= {"sync_binlog", "binlog_format"}
    if settings.get("wsrep_on", "OFF") == "OFF":
        ignored |= {"wsrep_load_data_splitting"}
    return [
        f"{name} is {settings[name]}: {why}; set it to {wanted[0]}"
        for name, (wanted, why) in _FIT.items()
        if settings.get(name, wanted[0]) not in wanted and name not in ignored
    ]


def _other_engine(table: str, engine: str) -> LaneBlocked:
    why = f"its engine is {engine}, which rolls nothing back"
    return LaneBlocked(f"table {table}: {why}: ALTER TABLE {table} ENGINE = InnoDB")


async def _columns(cursor: Any, table: str) -> set[str] | None:
    if engine := await fetch(cursor, _ENGINE, (table,)):
        raise _other_engine(table, engine[0][0])
    sql = "SELECT column_name FROM information_schema.columns"
    there = f"{sql} WHERE table_schema = DATABASE() AND table_name = %s"
    return {name for (name,) in await fetch(cursor, there, (table,))} or None


class MysqlPlugin(SinkPlugin):
    # Source: MariaDB documentation, "DECIMAL", "Identifier Names"; its json_lib.h,
    # JSON_DEPTH_LIMIT, which counts one more
    limits = Limits(
        whole_digits=35,
        decimal_digits=30,
        beyond_years=False,
        json_depth=31,
        # by InnoDB, whatever the case (error 1166)
        reserved=frozenset({"db_row_id", "db_trx_id", "db_roll_ptr", "fts_doc_id"}),
        name_bytes=64,
        last_character="\uffff",
        ignores_case=True,
    )

    def faults(self, settings: Settings) -> Iterator[tuple[str, str]]:
        """See `Plugin.faults`."""
        yield from super().faults(settings)
        if why := login_fault(settings.database_url, "/?#"):  # as urllib finds its end
            yield "database_url", why
            return
        try:
            server_address(settings.database_url, _PORT)
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
