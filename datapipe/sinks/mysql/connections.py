"""Connections to MariaDB or MySQL: PyMySQL's, in threads.

LOAD DATA LOCAL sends what the server asks for: it answers a statement with the name of a file, any
name, whatever the statement was. So a connection here reads no file: the one answer that it has is
what a load has offered before, and outside of a load it ends the connection. Those of the pool
don't have the capability at all.
Source: MySQL documentation, "Security Considerations for LOAD DATA LOCAL".

aiomysql, whose connections would need no threads, begins TLS by a second transport over the same
socket, which uvloop answers with "Device or resource busy" now and then.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import pymysql
from pymysql.connections import Connection, MySQLResult
from pymysql.constants import CR
from pymysql.converters import escape_item

from datapipe.sinks.server import Pool
from datapipe.sinks.threads import Sessions, in_thread
from datapipe.sinks.urls import Address

PACKET_BYTES = 65_536  # at most `max_allowed_packet`; each is put together under the GIL

_CONNECT_S = 10.0
_SILENT_S = 600.0  # a load's server that answers to keepalives, but says nothing

# A peer that vanishes silently is noticed: seconds, and milliseconds for the last.
_WATCHED = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}

# What all of our statements rely on, whatever the server's settings are. A client that vanishes or
# freezes holds its locks no longer than these time-outs, in seconds: the server ends its session
# when it is idle, in a transaction or not, or owes the rest of a LOAD DATA. Every warning counts,
# and notes as well: a rounded number is a note.
_SESSION = (
    "SET NAMES utf8mb4 COLLATE utf8mb4_bin, time_zone = '+00:00', lc_messages = 'en_US',"
    " sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', foreign_key_checks = 1,"
    " unique_checks = 1, sql_safe_updates = 0, sql_select_limit = 18446744073709551615,"
    " sql_notes = 1, max_error_count = 65535, wait_timeout = 60,"
    " net_read_timeout = 30, net_write_timeout = 60, innodb_lock_wait_timeout = {lock_s},"
    " lock_wait_timeout = {lock_s}",
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
)
_LOAD_LOCK_S = 10
_LOCK_S = 5

_ASKS = "the server asks for a file, and no load is under way: is that server the right one?"


def _watch(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in _WATCHED.items():
        if option := getattr(socket, name, None):
            end.setsockopt(socket.IPPROTO_TCP, option, value)


def bound(sql: str, values: Sequence[Any]) -> str:
    """The statement with its values in it; of a list SQL's: the driver takes none."""
    return sql % tuple(map(_literal, values)) if values else sql


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(escape_item, value))})"
    return str(escape_item(value))


# --- loads ---


class LoadConnection(Connection):  # type: ignore[misc]
    """A plain connection in autocommit, whose one file is what `load` is given."""

    _offered: bytes | memoryview | None = None

    def load(self, statement: str, data: bytes | memoryview) -> tuple[int, int]:
        """Run a LOAD DATA LOCAL of these bytes: how many rows it stored, how many warnings it has.

        Raises: pymysql.MySQLError.
        """
        self._offered = data
        try:
            with self.cursor() as cursor:
                return cursor.execute(statement), cursor.warning_count
        finally:
            self._offered = None

    def _read_query_result(self, unbuffered: bool = False) -> int:
        """See PyMySQL, whose own reads whatever file the server names."""
        self._result = None
        result = _Result(self)
        result.read()
        self._result = result
        if result.server_status is not None:
            self.server_status = result.server_status
        return int(result.affected_rows)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Those of one statement. Raises: pymysql.MySQLError."""
        with self.cursor() as cursor:
            cursor.execute(bound(sql, values))
            return list(cursor.fetchall())


class _Result(MySQLResult):  # type: ignore[misc]
    def _read_load_local_packet(self, first_packet: Any) -> None:
        """Send what was offered, once, whatever file the server asks for."""
        connection = self.connection
        offered, connection._offered = connection._offered, None
        if offered is None:
            connection._force_close()
            raise pymysql.OperationalError(CR.CR_SERVER_LOST, _ASKS)
        try:
            for at in range(0, len(offered), PACKET_BYTES):
                connection.write_packet(offered[at : at + PACKET_BYTES])
        except BaseException:
            connection._force_close()  # an end would make the server store the half of it
            raise
        connection.write_packet(b"")
        self._read_ok_packet(connection._read_packet())


def connected(address: Address, *, loads: bool = True) -> LoadConnection:
    """A connection. Blocks. Args: loads: it may send rows. Raises: pymysql.MySQLError."""
    connection = LoadConnection(
        host=address.host, port=address.port, user=address.user, database=address.database,
        password=address.password.encode().decode("latin-1"),  # as UTF-8, where it sends Latin-1
        charset="utf8mb4", autocommit=True, local_infile=loads, defer_connect=True,
        ssl=address.tls if address.required else None, ssl_disabled=address.tls is None,
        read_timeout=_CONNECT_S, write_timeout=_CONNECT_S, program_name="datapipe",
    )  # fmt: skip
    try:
        end = socket.create_connection((address.host, address.port), _CONNECT_S)
        _watch(end)
        connection.connect(end)
    except OSError as exc:
        raise pymysql.OperationalError(CR.CR_CONN_HOST_ERROR, f"can't connect: {exc}") from exc
    except pymysql.MySQLError:
        raise
    except Exception as exc:  # an answer that PyMySQL can't read; a package that it lacks
        raise pymysql.OperationalError(CR.CR_SERVER_HANDSHAKE_ERR, f"can't connect: {exc}") from exc
    for statement in _SESSION:
        connection.query(statement.format(lock_s=_LOAD_LOCK_S if loads else _LOCK_S))
    connection._read_timeout = connection._write_timeout = _SILENT_S
    return connection


def shut(connection: LoadConnection) -> None:
    """End what a thread does with it, from another one."""
    with suppress(OSError, AttributeError):  # it has no socket any more
        end = socket.socket(fileno=os.dup(connection._sock.fileno()))
        with end:
            end.shutdown(socket.SHUT_RDWR)


class LoadSessions(Sessions[LoadConnection]):
    """Connections for loads, each in a thread."""

    def is_closed(self, connection: LoadConnection) -> bool:
        """Also one that the server has ended: nothing else comes while nothing is asked."""
        if not connection.open:
            return True
        poll = select.poll()
        poll.register(connection._sock, select.POLLIN)
        return bool(poll.poll(0))

    def refusal(self) -> pymysql.MySQLError:
        return pymysql.OperationalError(CR.CR_SERVER_LOST, "shutting down")

    def roll_back(self, connection: LoadConnection) -> None:
        try:
            connection.query("ROLLBACK")
        except (pymysql.MySQLError, OSError):
            connection._force_close()  # the next START TRANSACTION would commit what is left

    def shut(self, connection: LoadConnection) -> None:
        shut(connection)

    def close_one(self, connection: LoadConnection) -> None:
        with suppress(pymysql.MySQLError):
            connection.close()


# --- small work ---


class SmallPool(Pool):
    """Connections whose statements run in threads, one after the other."""

    def __init__(self, address: Address, size: int) -> None:
        super().__init__(size)
        self._address = address

    async def connect(self) -> _Small:
        """See `Pool.connect`."""
        return _Small(await in_thread(partial(connected, self._address, loads=False))[1])


class _Small:
    """A connection, and its cursor."""

    def __init__(self, connection: LoadConnection) -> None:
        self._connection = connection
        self._cursor = connection.cursor()

    def cursor(self) -> AbstractAsyncContextManager[_Small]:
        return nullcontext(self)

    async def execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        await in_thread(partial(self._cursor.execute, bound(sql, values)))[1]
        self.description, self.rowcount = self._cursor.description, self._cursor.rowcount

    async def fetchall(self) -> Sequence[tuple[Any, ...]]:
        rows: Sequence[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    def close(self) -> None:
        """At once, whatever its thread waits for."""
        shut(self._connection)
        self._connection._force_close()
