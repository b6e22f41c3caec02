"""An event module that asks at each moment of a load into SQLite: see `tests.fault.gate`."""

import os
import socket
import sqlite3
from typing import Any

from datapipe.sinks.sqlite.connections import Connection
from tests.fault.modules.patching import patch

_GATE = ("127.0.0.1", int(os.environ["FAULT_GATE"]))
_execute, _executemany = Connection.execute, Connection.executemany


class _Broken(sqlite3.OperationalError):
    """An error of the disk, which says nothing about what is on it."""

    sqlite_errorcode = sqlite3.SQLITE_IOERR
    sqlite_errorname = "SQLITE_IOERR"


def _tell(moment: str) -> socket.socket:
    """That it has come, without waiting."""
    gate = socket.create_connection(_GATE)
    gate.sendall(f"{moment}\n".encode())
    return gate


def _ask(moment: str) -> None:
    """Wait until it may go on. Raises: sqlite3.Error: it may not."""
    with _tell(moment) as gate:
        if gate.recv(1) != b"1":
            raise _Broken("broken on purpose")


class _Load:
    """Where the transaction of a connection is."""

    entered = copying = False

    def enter(self) -> None:
        self.entered = True

    def copy(self, copying: bool) -> None:
        self.copying = copying


def _of(connection: Any) -> _Load:
    load: _Load = connection.__dict__.setdefault("load", _Load())
    return load


def _on_execute(self: Any, sql: str, *values: Any) -> Any:
    load = _of(self)
    if sql.startswith("BEGIN"):
        self.load = load = _Load()
    if not load.entered and "INSERT INTO" in sql and values and "segment" in values[0]:
        load.enter()
        _ask("LEDGER")
    if sql != "COMMIT" or not load.copying:
        return _execute(self, sql, *values)
    _ask("COMMIT")
    sent = _tell("SENT")
    cursor = _execute(self, sql, *values)
    load.copy(False)
    _ask("COMMITTED")
    sent.close()
    _tell("TOLD").close()
    return cursor


def _on_executemany(self: Any, sql: str, rows: Any) -> Any:
    load = _of(self)
    if load.entered and not load.copying and rows != ():
        load.copy(True)
        _ask("COPY")
    return _executemany(self, sql, rows)


patch(Connection, "execute", _on_execute)
patch(Connection, "executemany", _on_executemany)
