"""Connections to PostgreSQL: a pool of aiopg's for small work, and plain ones for loads in threads.

psycopg2 refuses COPY on an asynchronous connection, and a COPY sent with `execute` on one hangs
(psycopg/psycopg2 issues 428 and 781). So aiopg does all that is not COPY, and a load runs on a
plain psycopg2 connection, aiopg's own driver, in a thread: libpq releases the GIL, the event loop
stays free.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import aiopg
import psycopg2
import psycopg2.extensions

from datapipe.errors import ConfigError
from datapipe.sinks.postgres.errors import one_line
from datapipe.sinks.server import Pool
from datapipe.sinks.threads import Sessions, in_thread

# Source: PostgreSQL documentation, libpq "Parameter Key Words". Seconds, and milliseconds for the
# last: a peer that vanishes silently is noticed.
_CONNECTION = {
    "connect_timeout": "10",
    "application_name": "datapipe",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}

# Each transaction of ours begins with these. A host that loses power sends nothing, and the server
# waits for two hours, by the kernel's default, while the dead session holds its locks: with these
# it gives up after 20 s, about as we do. By SQL, for a pooler refuses `options` at the start,
# and a URL may bring its own; not SET LOCAL, so that idle sessions end, too; over a socket file
# they do nothing. Source: PostgreSQL documentation, "Connections and Authentication", "TCP
# Settings". Seconds, and milliseconds for the fourth.
PEER_MAY_VANISH = (
    "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 3;"
    " SET tcp_keepalives_count = 3; SET tcp_user_timeout = 20000;"
    " SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL statement_timeout = 0;"
)

# What is asked through the pool may take so long, in seconds; a pooler holds a query back for
# longer while the server behind it is away (PgBouncer: `query_wait_timeout`, 120 s).
_ANSWER_S = 20.0


def connection_dsn(url: str) -> str:
    """The libpq string of a database URL; what the URL sets takes precedence.

    On a Heroku dyno TLS is required: the network between it and its database is public.

    Raises: ConfigError: the URL can't be parsed; it is not repeated, for it holds a password.
    """
    try:
        given = psycopg2.extensions.parse_dsn(url)
    except psycopg2.Error:
        raise ConfigError("database_url: can't be read as a PostgreSQL URL") from None
    tls = {"sslmode": os.environ.get("PGSSLMODE") or "require"} if os.environ.get("DYNO") else {}
    # whatever the encoding of the database: only UTF8 holds all that clients can send
    utf8 = {"client_encoding": "UTF8"}
    dsn: str = psycopg2.extensions.make_dsn(**{**_CONNECTION, **tls, **given, **utf8})
    return dsn


class _Places:
    """File descriptors kept open, whose numbers are then given to duplicates of sockets.

    Reserved early they have small numbers: when a connection breaks, aiopg calls `select`, which
    refuses those from 1,024 on.
    """

    def __init__(self, count: int) -> None:
        self._nothing = os.open(os.devnull, os.O_RDONLY)
        self._free = [os.dup(self._nothing) for _ in range(count)]

    def take(self, descriptor: int) -> int:
        """The number under which a duplicate of it is open now."""
        return os.dup2(descriptor, self._free.pop(), inheritable=False)

    def leave(self, number: int) -> None:
        """Close what is open under that number; it stays ours."""
        os.dup2(self._nothing, number, inheritable=False)
        self._free.append(number)

    def close(self) -> None:
        for descriptor in (self._nothing, *self._free):
            os.close(descriptor)


class _Cancelled(psycopg2.OperationalError):  # type: ignore[misc]
    """The server cancelled the statement: `statement_timeout`, or somebody's `pg_cancel_backend`.

    Of psycopg2's own error aiopg makes an `asyncio.CancelledError`, which would end the task.
    """

    pgcode = "57014"


class _Connection(psycopg2.extensions.connection):  # type: ignore[misc]
    """A connection of the pool; the event loop watches a duplicate of its socket.

    libpq closes the socket itself when the connection breaks, while aiopg still has it on the loop.
    Whatever is opened next, in any thread, gets the same number, and uvloop, which keeps a handle
    for each number, then fails whoever watches it. The duplicate's number is ours until the loop
    has dropped it. (Source: uvloop, `handles/poll.pyx`: `_fatal_error` closes a handle that
    `Loop._polls` still holds.)
    """

    _watched = -1

    def __init__(self, places: _Places, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loop = asyncio.get_running_loop()
        self._places = places
        self._watched = places.take(super().fileno())

    def fileno(self) -> int:
        """What aiopg asks for once, to have it watched."""
        return self._watched

    def poll(self) -> int:
        """See psycopg2. aiopg calls it when there is something to read or write."""
        try:
            state: int = super().poll()
        except psycopg2.extensions.QueryCanceledError as exc:
            raise _Cancelled(one_line(exc)) from exc
        except psycopg2.Error:
            if self._watched >= 0 and (self.closed or super().fileno() < 0):
                self._unwatch()  # the duplicate would be ready to read for ever
            raise
        return state

    def close(self) -> None:
        super().close()
        if self._watched >= 0:
            self._unwatch()
            self._places.leave(self._watched)
            self._watched = -1

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._watched)
        self._loop.remove_writer(self._watched)


class AiopgPool(Pool):
    """See `Pool`; to the one address that answers.

    aiopg's own pool would wake nobody who waits for its place, and ends the work of others when it
    is terminated.
    """

    def __init__(self, dsn: Callable[[], Awaitable[str]], size: int) -> None:
        super().__init__(size)
        self._dsn = dsn
        self._places = _Places(size)
        self._answering: str | None = None

    async def connect(self) -> aiopg.Connection:
        if self._answering is None:
            # libpq changes its socket from one address to the next while aiopg watches the first
            look = partial(_answering, await self._dsn())
            self._answering = await in_thread(look)[1]
        return await aiopg.connect(
            self._answering, timeout=_ANSWER_S, enable_json=False, enable_hstore=False,
            enable_uuid=False, connection_factory=partial(_Connection, self._places),
        )  # fmt: skip

    def is_closed(self, connection: aiopg.Connection) -> bool:
        return bool(connection.closed)

    def close_one(self, connection: aiopg.Connection) -> None:
        connection.raw.close()

    def renew(self) -> None:
        """See `Pool.renew`; find the address anew."""
        super().renew()
        self._answering = None

    def close(self) -> None:
        """See `Pool.close`."""
        super().close()
        self._places.close()


def _answering(dsn: str) -> str:
    """The same, with the one address that answers of those that it names. Blocks.

    Raises: psycopg2.Error: none does.
    """
    connection = psycopg2.connect(dsn)
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            if end.family == socket.AF_UNIX:
                return dsn
            address, port = end.getpeername()[:2]
        host = connection.info.host
        pinned: str = psycopg2.extensions.make_dsn(dsn, host=host, hostaddr=address, port=port)
    finally:
        connection.close()
    return pinned


class Loads(Sessions[psycopg2.extensions.connection]):
    """Plain connections for loads."""

    def is_closed(self, connection: psycopg2.extensions.connection) -> bool:
        return bool(connection.closed)

    def refusal(self) -> psycopg2.Error:
        return psycopg2.OperationalError("shutting down")

    def roll_back(self, connection: psycopg2.extensions.connection) -> None:
        with suppress(psycopg2.Error):
            connection.cursor().execute("ROLLBACK")

    def shut(self, connection: psycopg2.extensions.connection) -> None:
        with suppress(psycopg2.Error, OSError):
            end = socket.socket(fileno=os.dup(connection.fileno()))
            with end:
                end.shutdown(socket.SHUT_RDWR)

    def close_one(self, connection: psycopg2.extensions.connection) -> None:
        connection.close()
