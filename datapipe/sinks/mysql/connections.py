"""Connections to MariaDB or MySQL: a pool of aiomysql's for small work, PyMySQL's for loads.

LOAD DATA LOCAL sends what the server asks for: it answers a statement with the name of a file, any
name, whatever the statement was. So a connection here reads no file: the one answer that it has is
what a load has offered before, and outside of a load it ends the connection. Those of the pool
don't have the capability at all.
Source: MySQL documentation, "Security Considerations for LOAD DATA LOCAL".
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import aiomysql
import pymysql
from pymysql.connections import Connection, MySQLResult
from pymysql.constants import CLIENT, CR
from pymysql.converters import escape_item

from datapipe.errors import ConfigError
from datapipe.sinks.threads import Sessions

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
    " unique_checks = 1, sql_notes = 1, max_error_count = 65535, wait_timeout = 60,"
    " net_read_timeout = 30, net_write_timeout = 60, innodb_lock_wait_timeout = {lock_s},"
    " lock_wait_timeout = {lock_s}",
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
)
_LOAD_LOCK_S = 10
_LOCK_S = 5

_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_OPTIONS = ("ssl-mode", "ssl-ca", "ssl-cert", "ssl-key")


@dataclass(frozen=True)
class Address:
    """Where the database is. Attributes: tls: None: without; required: never without."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    tls: ssl.SSLContext | None
    required: bool

    def credentials(self) -> dict[str, Any]:
        """What both drivers want; a password goes as UTF-8, where they would send Latin-1."""
        password = self.password.encode().decode("latin-1")
        return {"user": self.user, "password": password, "host": self.host, "port": self.port}


def address_of(url: str) -> Address:
    """What a database URL names. On a Heroku dyno TLS is required: the network is public.

    Raises: ConfigError: it can't be used; it is not repeated, for it holds a password.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        port = parts.port or 3306
    except ValueError:
        raise ConfigError("can't be read as a URL") from None
    if unknown := options.keys() - set(_OPTIONS):
        raise ConfigError(f"{min(unknown)!r} is none of {', '.join(_OPTIONS)}")
    database = unquote(parts.path.lstrip("/"))
    if not parts.hostname or not database:
        raise ConfigError("must be like mysql://user:password@host:3306/database")
    default = "VERIFY_CA" if "ssl-ca" in options else "PREFERRED"
    mode = options.get("ssl-mode", "REQUIRED" if os.environ.get("DYNO") else default).upper()
    if mode not in _MODES:
        raise ConfigError(f"ssl-mode is none of {', '.join(_MODES)}")
    return Address(
        parts.hostname, port, unquote(parts.username or ""), unquote(parts.password or ""),
        database, None if mode == "DISABLED" else _tls(mode, options),
        mode not in ("DISABLED", "PREFERRED"),
    )  # fmt: skip


def _tls(mode: str, options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ssl-ca"))
        context.check_hostname = mode == "VERIFY_IDENTITY"
        context.verify_mode = ssl.CERT_REQUIRED if "VERIFY" in mode else ssl.CERT_NONE
        if certificate := options.get("ssl-cert"):
            context.load_cert_chain(certificate, options.get("ssl-key"))
    except OSError as exc:
        raise ConfigError(f"ssl-ca, ssl-cert or ssl-key: {exc}") from None
    # certificates that MySQL makes for itself lack what is strictly wanted
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _watch(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in _WATCHED.items():
        if option := getattr(socket, name, None):
            end.setsockopt(socket.IPPROTO_TCP, option, value)


def bound(sql: str, values: Sequence[Any]) -> str:
    """The statement with its values in it; of a list SQL's: neither driver takes one."""
    return sql % tuple(map(_literal, values)) if values else sql


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(escape_item, value))})"
    return str(escape_item(value))


# --- loads ---


class LoadConnection(Connection):  # type: ignore[misc]
    """A plain connection in autocommit, whose one file is what `load` is given."""

    _offered: Iterable[bytes] | None = None

    def load(self, statement: str, packets: Iterable[bytes]) -> tuple[int, int]:
        """Run a LOAD DATA LOCAL of these bytes: how many rows it stored, how many warnings it has.

        Args: packets: none is empty, none longer than the server's `max_allowed_packet`.
        Raises: pymysql.MySQLError.
        """
        self._offered = packets
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
            raise pymysql.OperationalError(CR.CR_SERVER_LOST, ASKS)
        try:
            for packet in offered:
                connection.write_packet(packet)
        except BaseException:
            connection._force_close()  # an end would make the server store the half of it
            raise
        connection.write_packet(b"")
        self._read_ok_packet(connection._read_packet())


ASKS = "the server asks for a file, and no load is under way: is that server the right one?"


def connected(address: Address) -> LoadConnection:
    """A connection for loads. Blocks. Raises: pymysql.MySQLError."""
    connection = LoadConnection(
        **address.credentials(), database=address.database, charset="utf8mb4", autocommit=True,
        local_infile=True, defer_connect=True, ssl=address.tls if address.required else None,
        ssl_disabled=address.tls is None, read_timeout=_SILENT_S, write_timeout=_SILENT_S,
        program_name="datapipe",
    )  # fmt: skip
    try:
        end = socket.create_connection((address.host, address.port), _CONNECT_S)
        _watch(end)
        connection.connect(end)
    except OSError as exc:
        raise pymysql.OperationalError(CR.CR_CONN_HOST_ERROR, f"can't connect: {exc}") from exc
    for statement in _SESSION:
        connection.query(statement.format(lock_s=_LOAD_LOCK_S))
    return connection


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
        with suppress(pymysql.MySQLError, OSError):
            connection.query("ROLLBACK")

    def shut(self, connection: LoadConnection) -> None:
        with suppress(OSError, AttributeError):  # it has no socket any more
            end = socket.socket(fileno=os.dup(connection._sock.fileno()))
            with end:
                end.shutdown(socket.SHUT_RDWR)

    def close_one(self, connection: LoadConnection) -> None:
        with suppress(pymysql.MySQLError):
            connection.close()


# --- small work ---


class _Cursor(aiomysql.Cursor):  # type: ignore[misc]
    async def _show_warnings(self, connection: Any) -> None:
        """None: aiomysql would make Python's warnings of them."""


class _Pooled(aiomysql.Connection):  # type: ignore[misc]
    async def _request_authentication(self) -> None:
        """See aiomysql, which goes on without TLS where the server has none, and says it has."""
        if self._ssl_context and not self.server_capabilities & CLIENT.SSL:
            if self.required:
                text = "TLS is required, and the server has none"
                raise pymysql.OperationalError(CR.CR_SSL_CONNECTION_ERROR, text)
            self._ssl_context: ssl.SSLContext | None = None
            self.client_flag &= ~CLIENT.SSL
        await super()._request_authentication()


class Pool:
    """A few connections, kept; the dead ones are found by use. One that fails is closed alone."""

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._turns = asyncio.Semaphore(size)
        self._free: list[Any] = []

    @asynccontextmanager
    async def cursor(self) -> AsyncIterator[aiomysql.Cursor]:
        """In autocommit, on a connection that is free, or a new one; not used again after an error.

        Raises: pymysql.MySQLError, OSError.
        """
        async with self._turns:
            free = self._free
            connection = self._free.pop() if self._free else await self._connect()
            try:
                async with connection.cursor() as cursor:
                    yield cursor
            except RuntimeError as exc:  # as aiomysql says it
                connection.close()
                raise pymysql.OperationalError(CR.CR_SERVER_LOST, ASKS) from exc
            except BaseException:
                connection.close()
                raise
            if free is self._free:
                free.append(connection)
            else:
                connection.close()

    async def _connect(self) -> Any:
        address = self._address
        connection = _Pooled(
            **address.credentials(), db=address.database, charset="utf8mb4", autocommit=True,
            ssl=address.tls, cursorclass=_Cursor, connect_timeout=_CONNECT_S,
            program_name="datapipe",
        )  # fmt: skip
        connection.required = address.required
        await connection._connect()
        descriptor = connection._writer.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(descriptor)) as end:
            _watch(end)
        for statement in _SESSION:
            await connection.query(statement.format(lock_s=_LOCK_S))
        return connection

    def renew(self) -> None:
        """Close those that are free, the others as soon as they are."""
        free, self._free = self._free, []
        for connection in free:
            connection.close()
