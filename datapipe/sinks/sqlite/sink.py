"""SQLite as the sink: one file, no server, nothing to install."""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from datapipe.errors import ConfigError
from datapipe.events.limits import Limits
from datapipe.events.types import Column
from datapipe.health import Wait
from datapipe.settings import Settings
from datapipe.sinks import Database, SinkPlugin, Table
from datapipe.sinks.sql import SqlSink
from datapipe.sinks.sql_tables import Result, Statement
from datapipe.sinks.sql_transaction import SqlTransaction
from datapipe.sinks.sqlite.connections import Connection, File
from datapipe.sinks.sqlite.copy import copy_rows
from datapipe.sinks.sqlite.dialect import DIALECT, marked
from datapipe.sinks.sqlite.errors import AWAY, error_of, primary, verdict
from datapipe.sinks.transaction import Entry, RefusedRow, Rows, Transaction
from datapipe.sinks.urls import file_path
from datapipe.sinks.verdict import Verdict

_OLDEST = (3, 37, 0)  # with STRICT tables

# Source: Linux, `Documentation/filesystems`; SQLite documentation, "How To Corrupt An SQLite
# Database File", on locks there.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "fuse.sshfs", "fuse.glusterfs")

_T = TypeVar("_T")


class SqliteSink(SqlSink):
    """Loads, and all other work, in threads, each with a connection to itself."""

    product = "SQLite"

    def __init__(self, path: Path, settings: Settings, process: str) -> None:
        super().__init__(DIALECT, settings, process)
        self._file = File(path)
        self._writing = asyncio.Lock()  # one after the other, so that only one has to look

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        """See `TransactionalSink.transact`."""
        return await self._write(lambda c: work(SqliteTransaction(c, self._process)), lane)

    async def _write(self, work: Callable[[Connection], _T], lane: str | None = None) -> _T:
        async with self._writing:
            return await self._outcome(self._file.write(work, lane), lane)

    async def _read(self, work: Callable[[Connection], _T], lane: str | None = None) -> _T:
        return await self._outcome(self._file.run(self._file.connect, work), lane)

    async def _outcome(self, work: Awaitable[_T], lane: str | None) -> _T:
        """The same, with errors of ours; notes that the database is down, if so.

        Raises: SinkUnavailable; of a lane's work: LaneBlocked, TableMissing.
        """
        began = time.perf_counter()
        try:
            result = await work
        except sqlite3.Error as exc:
            error = error_of(exc, self._file.path, lane)
            if verdict(exc) is Verdict.DOWN:
                self.down(str(error), refuses=True)
            raise error from exc
        if lane is None:
            self.answer_s = time.perf_counter() - began
        if self.state().up is None:
            self.works(began)
        return result

    async def waits(self) -> dict[str, Wait]:
        """See `Sink.waits`."""
        held = Wait("lock", "another program writes to the file", "Let it commit, or end it.")
        return dict.fromkeys(self._file.waiting, held)

    def down(self, error: str, *, refuses: bool = False) -> None:
        """See `TransactionalSink.down`."""
        super().down(error, refuses=refuses)
        self._file.close_idle()

    def abort(self) -> None:
        """See `Sink.abort`."""
        self._file.abort()

    async def close(self) -> None:
        await self._file.close()

    async def hint(self, table: str) -> str:
        """See `Sink.hint`."""
        return shlex.join(["sqlite3", str(self._file.path), f"SELECT * FROM {table}"])

    # --- see `SqlSink` ---

    async def query(self, sql: str, *values: Any, lane: str | None = None) -> list[tuple[Any, ...]]:
        """See `SqlSink.query`."""

        def fetch(connection: Connection) -> list[tuple[Any, ...]]:
            return self._file.patiently(connection, marked(sql), values).fetchall()

        return await self._read(fetch, lane)

    async def transaction(self, *statements: Statement) -> Result:
        """See `SqlSink.transaction`."""

        def run(connection: Connection) -> Result:
            for sql, values in statements:
                cursor = connection.execute(marked(sql), values)
                result = Result(cursor.fetchall(), cursor.rowcount)
            return result

        return await self._write(run)

    async def read_version(self) -> str:
        """See `SqlSink.read_version`."""
        return sqlite3.sqlite_version

    async def columns(self, table: str) -> set[str] | None:
        """See `SqlSink.columns`."""
        if not self._file.path.exists():
            return None  # to look would make it
        return await self._read(partial(self._columns, table), table)

    def _columns(self, table: str, connection: Connection) -> set[str] | None:
        sql = "SELECT name FROM pragma_table_xinfo(?)"
        return {name for (name,) in self._file.patiently(connection, sql, (table,))} or None

    async def define(self, table: str, changes: Callable[[set[str] | None], Sequence[str]]) -> None:
        """See `SqlSink.define`."""

        def make(connection: Connection) -> None:
            for sql in changes(self._columns(table, connection)):
                connection.execute(sql)

        await self._write(make, table)

    async def findings(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `SqlSink.findings`."""
        where, may = f"database: {self._file.path}", os.access(self._file.path.parent, os.W_OK)
        if self._file.path.exists():
            await self._read(self._file.may_write)
            ((mode,),) = await self.query("PRAGMA journal_mode")
            soon = "" if mode == "wal" else ", WAL from the first load on, if its file system can"
            found = [("ok", f"{where}: journal mode {mode}{soon}")]
        else:
            found = [("ok", f"{where}: will be created when needed")]
        if not may:
            found = [("fail", f"{where}: its folder can't be written")]
        if kind := _network(self._file.path):
            text = f"is on {kind}, whose locks may fail: two machines at once destroy it"
            found.append(("warn", f"{where}: {text}"))
        return found

    def is_away(self, exc: BaseException | None) -> bool:
        """See `SqlSink.is_away`."""
        return isinstance(exc, sqlite3.Error) and primary(exc) in AWAY


class SqliteTransaction(SqlTransaction):
    """A `Transaction` that `connection` has begun."""

    def __init__(self, connection: Connection, process: str) -> None:
        super().__init__(DIALECT, process)
        self._connection = connection

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """See `SqlTransaction.query`."""
        return self._connection.execute(marked(sql), values).fetchall()

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """See `SqlTransaction.many`."""
        self._connection.executemany(marked(sql), rows)

    def enter(
        self,
        kind: str,
        entries: Sequence[Entry],
        lane: str | None = None,
        load: str | None = None,
        not_after: float = math.inf,
    ) -> set[str]:
        """See `Transaction.enter`: nobody else writes until the end, and time is this machine's."""
        if time.time() >= not_after:
            return set()
        sql = marked(
            f"INSERT INTO {self._ledger} (segment, events, source, body, kind, lane, load, process)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
        )
        more = kind, lane, load, self._process
        insert = self._connection.execute
        return {each.id for each in entries if insert(sql, (*each, *more)).rowcount}

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        """See `Transaction.copy`."""
        return copy_rows(self._connection, table.name, columns, rows)


def _network(path: Path) -> str | None:
    """The kind of the network file system that it is on, if it is and Linux says so."""
    device, mounts = os.stat(path.parent).st_dev, Path("/proc/self/mountinfo")
    number = f" {os.major(device)}:{os.minor(device)} "
    for mount in mounts.read_text().splitlines() if mounts.exists() else ():
        before, _, behind = mount.partition(" - ")
        if number in before and (kind := behind.split(" ")[0]) in _NETWORK:
            return kind
    return None


def _path(url: str) -> Path:
    """The file that a URL names. Raises: ConfigError: there can't be one."""
    path = file_path(url).absolute()
    if path.is_dir():
        raise ConfigError(f"database_url: {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"database_url: the folder {path.parent} does not exist; make it")
    return path


class SqlitePlugin(SinkPlugin):
    is_file = True
    # Source: SQLite documentation, "CREATE TABLE"
    limits = Limits(beyond_years=False, reserved_tables=("sqlite_",), ignores_case=True)

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[Database]:
        """Raises: ConfigError: this SQLite is too old, or there can't be such a file."""
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigError(
                f"database_url: Python's SQLite is {sqlite3.sqlite_version}; 3.37 is the oldest "
                "that can be used"
            )
        sink = SqliteSink(_path(settings.database_url), settings, process)
        try:
            yield sink
        finally:
            await sink.close()
