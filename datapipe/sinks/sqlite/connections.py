"""Connections to one file: who writes, who waits for whom, and whether it is still the same file.

SQLite lets one transaction write at a time, and whoever waits for its end has to look again and
again. SQLite's own way of waiting would soon look every 100 ms only, and might never see the short
gaps between the loads of another process. So we look more often, and leave a gap behind each
transaction of ours in which others do look.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from datapipe.sinks.sqlite.errors import primary
from datapipe.sinks.threads import Sessions

LOCK_WAIT_S = 30.0  # for the transactions of others
_LOOK_S = 0.002
_GAP_S = 0.006

_T = TypeVar("_T")


class Connection(sqlite3.Connection):
    """In autocommit.

    Attributes:
        file: device and inode of what it has open.
        go_on: raises sqlite3.Error if what is under way is to be given up.
    """

    file: tuple[int, int]
    go_on: Callable[[], None]


class _Stopping(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_INTERRUPT


class File(Sessions[Connection]):
    """The sessions with one file, which need not be there yet.

    A file that was deleted or replaced is noticed before the next transaction: then it is opened
    anew, and made if it is missing. SQLite would go on to write to what nobody can see any more.

    Attributes: waiting: lanes whose transactions wait for somebody else's.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.waiting: set[str] = set()
        self._quiet_until = 0.0

    async def write(self, work: Callable[[Connection], _T], lane: str | None = None) -> _T:
        """Do work in a transaction; once this returns, it is on the disk. Raises: as `run`."""

        def whole(connection: Connection) -> _T:
            self.patiently(connection, "PRAGMA journal_mode = WAL", lane=lane)  # most often it is
            self._stopping.wait(self._quiet_until - time.monotonic())
            self.patiently(connection, "BEGIN IMMEDIATE", lane=lane)
            result = work(connection)
            self.patiently(connection, "COMMIT", lane=lane)  # without WAL, readers hold it up
            self._quiet_until = time.monotonic() + _GAP_S
            return result

        return await self.run(self.connect, whole)

    def patiently(
        self, connection: Connection, sql: str, values: Sequence[Any] = (), lane: str | None = None
    ) -> sqlite3.Cursor:
        """Execute it, as soon as nobody else has the lock that it needs. Raises: sqlite3.Error."""
        until = time.monotonic() + LOCK_WAIT_S
        try:
            while True:
                self._go_on()
                try:
                    return connection.execute(sql, values)
                except sqlite3.OperationalError as exc:
                    if primary(exc) != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                        raise
                if lane:
                    self.waiting.add(lane)
                self._stopping.wait(_LOOK_S)
        finally:
            self.waiting.discard(lane or "")

    def may_write(self, connection: Connection) -> None:
        """Raises: sqlite3.Error: not now, or not at all. Changes nothing."""
        self.patiently(connection, "BEGIN IMMEDIATE")
        connection.rollback()

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise self.refusal()

    def connect(self) -> Connection:
        connection = sqlite3.connect(
            self.path, timeout=0.0, isolation_level=None, check_same_thread=False,
            factory=Connection,
        )  # fmt: skip
        try:
            # FULL, which flushes at each COMMIT; and without WAL, the folder that had the journal
            self.patiently(connection, "PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error:
            connection.close()
            raise
        connection.file, connection.go_on = self._identity(), self._go_on
        return connection

    def _identity(self) -> tuple[int, int]:
        with suppress(OSError):
            found = os.stat(self.path)
            return found.st_dev, found.st_ino
        return 0, 0

    # --- see `Sessions` ---

    def is_closed(self, connection: Connection) -> bool:
        if connection.file == self._identity():
            return False
        connection.close()
        return True

    def refusal(self) -> sqlite3.Error:
        return _Stopping("shutting down")

    def roll_back(self, connection: Connection) -> None:
        with suppress(sqlite3.Error):
            connection.rollback()

    def shut(self, connection: Connection) -> None:
        connection.interrupt()

    def close_one(self, connection: Connection) -> None:
        connection.close()
