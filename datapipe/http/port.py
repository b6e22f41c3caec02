"""The port: takes connections as long as there are open files for them.

Without open files nothing works: neither journal nor database, nor the port itself. So some of them
are kept for ourselves (`_OWN_FILES` of `RLIMIT_NOFILE`), and what comes beyond the rest waits with
the kernel until others go. Neither event loop bounds what it accepts, so this accepts by itself.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import structlog

from datapipe.http.server import Server
from datapipe.settings import Settings

_BACKLOG = 1024
_OWN_FILES = 128  # journals, also adopted ones (6 each), database, IronMQ (16), peers; at most half
_AT_ONCE = 64  # connections taken before others have their turn
_LOOK_S = 0.1  # between two looks whether one has gone
_QUIET_S = 60.0  # between two lines that connections wait

log = structlog.stdlib.get_logger("datapipe.http.port")


def raise_limit() -> int:
    """Have as many open files as may be had; how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says "unlimited", and does not take its own word
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


class Port:
    """Listens; attributes: `addresses`, as the sockets name them."""

    def __init__(self, server: Server, files: int) -> None:
        self._server = server
        self._most = files - min(_OWN_FILES, files // 2)
        self._open = 0  # connections at most, by the last count and what came since
        self._starting: set[asyncio.Task[object]] = set()
        self._quiet_until = 0.0
        self._listeners: list[socket.socket] = []
        self._waiting: asyncio.TimerHandle | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [each.getsockname()[:2] for each in self._listeners]

    @asynccontextmanager
    async def listening(self, settings: Settings) -> AsyncIterator[None]:
        """Take connections as long as the block lasts. Raises: OSError: it can't listen."""
        with ExitStack() as stack:
            bound = await asyncio.get_running_loop().create_server(
                self._server, settings.host, settings.port, start_serving=False,
                reuse_port=settings.reuse_port or None,
            )  # fmt: skip
            try:
                self._listeners = [stack.enter_context(each.dup()) for each in bound.sockets]
            finally:
                bound.close()
            for listener in self._listeners:
                listener.setblocking(False)
                listener.listen(_BACKLOG)
            stack.callback(self._pause)
            self._resume()
            yield

    def _resume(self) -> None:
        self._waiting = None
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._take, listener)

    def _pause(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _take(self, listener: socket.socket) -> None:
        """Some connections wait at this socket; those not taken now are reported again."""
        loop = asyncio.get_running_loop()
        for _ in range(_AT_ONCE):
            try:
                if not self._has_room():
                    raise OSError(errno.EMFILE, "no open file left for connections")
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._tell(exc)
                    self._pause()
                    self._waiting = loop.call_later(_LOOK_S, self._resume)
                return  # else it went before it was taken
            connection.setblocking(False)
            self._open += 1
            task = loop.create_task(loop.connect_accepted_socket(self._server, connection))
            self._starting.add(task)
            task.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[object]) -> None:
        self._starting.discard(task)
        if not task.cancelled():
            task.exception()  # a connection that was gone at once is nobody's fault

    def _has_room(self) -> bool:
        """Whether one more connection may be open."""
        if self._open >= self._most:  # perhaps some have gone
            self._open = len(self._server.connections) + len(self._starting)
        return self._open < self._most

    def _tell(self, exc: OSError) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            log.warning("connections wait", open=self._open, error=exc.strerror)
        self._quiet_until = now + _QUIET_S
