"""The HTTP server: plain POSTs of events are served here, everything else by aiohttp.

`POST /` is most of the work. aiohttp makes a task, a request and a response object for each, which
costs more than all that datapipe does with it. Here the head of a plain one is looked up (`heads`),
a single event goes to the group commit as it is, and the answer is written once it is durable; what
needs a closer look gets a task. The first request of another kind (another path, chunks, HTTP/1.0,
...) hands the connection over to aiohttp for the rest of its life (`relay`). Both ways ask the same
`Ingest`. `make bench` measures this against aiohttp alone.

`runner` puts it under aiohttp's `AppRunner`, so that sites and gunicorn's worker can serve it.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from time import perf_counter
from typing import cast

from aiohttp import web

from datapipe.errors import Reason, Refused
from datapipe.http import responses
from datapipe.http.body import Body
from datapipe.http.heads import END, PLAIN_HEAD_BYTES, Head, Heads, Syntax
from datapipe.http.ingest import Ingest
from datapipe.http.relay import Relay
from datapipe.http.responses import Answer, request_id

KEEPALIVE_S = 3630.0  # longer than a proxy keeps a connection, or it would send into a closed one
_LINGER_S = 3.0  # for the rest of a body whose answer is out; a reset would overtake the answer
_SWEEP_S = 0.5
_CLOSE_S = 1.0  # at the end, for answers that are under way
_AHEAD_BYTES = 65_536  # of requests behind the one that is being answered
_NEVER = float("inf")


class Server:
    """Makes a protocol for each connection: what sites take for a server.

    Attributes:
        connections: those that are open.
        requests_count: requests so far; gunicorn ends a worker after so many.
    """

    def __init__(
        self,
        handler: Ingest,
        fallback: web.Server,
        heads: Heads,
        head_timeout_s: float,
    ) -> None:
        self.handler = handler
        self.fallback = fallback
        self.heads = heads
        self.head_timeout_s = head_timeout_s
        self.connections: set[Connection] = set()
        self.plain_count = 0
        self.closing = False

    def __call__(self) -> Connection:
        return Connection(self)

    @property
    def requests_count(self) -> int:
        return self.plain_count + self.fallback.requests_count

    async def end_late(self) -> None:
        """Until cancelled, close connections whose deadline has passed."""
        while True:
            await asyncio.sleep(min(_SWEEP_S, self.head_timeout_s / 2))
            now = perf_counter()
            for connection in list(self.connections):
                connection.end_if_late(now)

    async def close(self) -> None:
        """Close connections, each once its answer is out; bounded in time."""
        self.closing = True
        until = perf_counter() + _CLOSE_S
        while left := [each for each in self.connections if not each.end()]:
            if perf_counter() > until:
                break
            await asyncio.sleep(0.02)
        for connection in left:
            connection.abort()


class Connection(asyncio.Protocol):
    """One connection: requests one after the other, or all of them passed on to aiohttp."""

    __slots__ = (
        "_answering",
        "_at",
        "_began",
        "_body",
        "_closes",
        "_deadline",
        "_gone",
        "_id",
        "_missing",
        "_received",
        "_server",
        "_task",
        "_transport",
        "_unread",
        "relay",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._received, self._at = b"", 0  # requests to come, from this byte on
        self._answering = False
        self._began = 0.0  # the request: `perf_counter` when all of it was here
        self._id = ""  # the request's
        self._task: asyncio.Task[None] | None = None
        self._body: asyncio.StreamReader | None = None  # of the request, while it is on its way
        self._missing = 0  # bytes of it that are to come
        self._closes = False  # after the request
        self._unread = False  # the client does not read its answers
        self._deadline = _NEVER
        self._gone: asyncio.Future[None] | None = None
        self.relay: Relay | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
        )
        self._server.connections.add(self)
        self._deadline = (
            perf_counter() + self._server.head_timeout_s
        )  # if it never says a word, too

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        if self._gone is not None:
            self._gone.set_result(None)
        if self.relay is not None:
            self.relay.handler.connection_lost(exc)
        if self._body is not None:
            self._body.set_exception(ConnectionResetError("the client has left"))

    def gone(self) -> asyncio.Future[None]:
        """Done once the client has left."""
        if self._gone is None:
            self._gone = asyncio.get_running_loop().create_future()
            if self._transport is None:
                self._gone.set_result(None)
        return self._gone

    # --- in ---

    def data_received(self, data: bytes) -> None:
        if self.relay is not None:
            self._pass_on(self.relay, data)
            return
        if self._missing:
            data = self._take_body(data)
        if not data:
            return
        self._received = self._received[self._at :] + data
        self._at = 0
        self._next()
        if len(self._received) > _AHEAD_BYTES and (self._answering or self._unread):
            cast(asyncio.Transport, self._transport).pause_reading()

    def _next(self) -> None:
        """Begin with the next request, if its head is here."""
        data, start = self._received, self._at
        busy = self._answering or self._missing or self._unread
        if busy or not data or self._transport is None or self._transport.is_closing():
            return
        try:
            end = data.find(END, start) + len(END)
            if end < len(END):
                self._wait_for_head(data[start:])
                return
            head = self._server.heads.read(data[start:end])
        except Refused as exc:
            self._refuse(exc)
            return
        if head is None:
            self._hand_over()
        else:
            self._at = end
            self._begin(head)

    def _wait_for_head(self, data: bytes) -> None:
        """Raises: Refused: it is malformed as far as it is here."""
        if not Syntax().feed(data) or len(data) > PLAIN_HEAD_BYTES:
            self._hand_over()
        elif self._deadline > (late := perf_counter() + self._server.head_timeout_s):
            self._deadline = late

    def _begin(self, head: Head) -> None:
        """Answer a plain request, whose body begins with what was received."""
        self._began = perf_counter()
        self._deadline = _NEVER
        self._answering = True
        self._server.plain_count += 1
        self._id = request_id(head.headers)
        body = self._received[self._at : self._at + head.length]
        self._at += len(body)
        if self._at == len(self._received):
            self._received, self._at = b"", 0  # or a connection at rest would hold its last body
        self._missing = head.length - len(body)
        source: bytes | Body = body
        if self._missing:
            transport = cast(asyncio.Transport, self._transport)
            transport.resume_reading()  # what is ahead may have paused it
            self._body = asyncio.StreamReader(_AHEAD_BYTES)
            self._body.set_transport(transport)
            self._body.feed_data(body)
            source = Body(head.length, partial(self._body.read, _AHEAD_BYTES))
        elif not head.waits and self._server.handler.take(
            head.headers, head.credentials, body, self._id, self._write
        ):
            return
        self._task = asyncio.get_running_loop().create_task(self._serve(head, source))

    async def _serve(self, head: Head, source: bytes | Body) -> None:
        handler = self._server.handler
        answering = handler.answer(head.headers, head.credentials, source, self._id, self.gone)
        del source  # or who waits for a load would hold a body
        try:
            answer = await answering
        except Exception as exc:
            answer = responses.internal_error(exc, head.headers, self._id, "/")
        self._write(answer)

    def _take_body(self, data: bytes) -> bytes:
        """Take the rest of a body; returns what comes behind it."""
        body, rest = data[: self._missing], data[self._missing :]
        self._missing -= len(body)
        if self._body is not None:
            self._body.feed_data(body)
        if not self._missing:
            if self._body is not None:
                self._body.feed_eof()
                self._body = None
                self._began = perf_counter()
            if not self._answering:
                self._finish(perf_counter())
        return rest

    # --- out ---

    def _write(self, answer: Answer) -> None:
        """Write the answer of the request; called by the group commit, so it must not fail."""
        self._answering, self._task = False, None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(answer.wire(self._id))
        now = perf_counter()
        self._server.handler.observe(now - self._began)
        self._closes = answer.close or self._server.closing
        if self._missing:
            self._body = None
            self._deadline = now + _LINGER_S
            transport.resume_reading()
        else:
            self._finish(now)

    def _finish(self, now: float) -> None:
        """The request is over: wait for the next, or close."""
        if (transport := self._transport) is None:
            return
        if self._closes:
            transport.close()
            return
        self._deadline = now + KEEPALIVE_S
        if len(self._received) - self._at <= _AHEAD_BYTES:
            transport.resume_reading()
        if self._received:
            asyncio.get_running_loop().call_soon(self._next)

    def _refuse(self, refused: Refused) -> None:
        """Answer a request whose head can't be read, and close."""
        if self._transport is not None and not self._transport.is_closing():
            answer = responses.refused(refused)._replace(close=True)
            self._transport.write(answer.wire(request_id({})))
            self._transport.close()
        self._received, self._at = b"", 0

    def pause_writing(self) -> None:
        self._unread = True
        if self.relay is not None:
            self.relay.handler.pause_writing()

    def resume_writing(self) -> None:
        self._unread = False
        if self.relay is not None:
            self.relay.handler.resume_writing()
        else:
            self._next()

    # --- passed on ---

    def _hand_over(self) -> None:
        """Let aiohttp serve the connection from here on."""
        data, self._received = self._received[self._at :], b""
        self._at = 0
        transport = cast(asyncio.Transport, self._transport)
        transport.resume_reading()
        self.relay = Relay(self._server.fallback(), transport)
        self._pass_on(self.relay, data)

    def _pass_on(self, relay: Relay, data: bytes) -> None:
        relay.data_received(data)
        self._watch(relay)

    def _watch(self, relay: Relay) -> None:
        """Bytes have come, or an answer has gone: refuse what is malformed, bound a head's time."""
        if relay.refused is not None and relay.idle:
            self._refuse(relay.refused)
        late = perf_counter() + self._server.head_timeout_s
        self._deadline = min(self._deadline, late) if relay.in_head else _NEVER

    def answered(self, keep_alive: bool, seconds: float | None) -> None:
        """aiohttp has sent the answer to a request.

        Args:
            keep_alive: false: it was the last of the connection.
            seconds: that a POST of events took.
        """
        if seconds is not None:
            self._server.handler.observe(seconds)
        if self.relay is not None:
            self.relay.answered(keep_alive)
            self._watch(self.relay)

    # --- the end ---

    def end_if_late(self, now: float) -> None:
        """Close it, if what it waits for has not come in time."""
        if (transport := self._transport) is None:
            return
        if transport.is_closing():  # for ever, if the client does not read what is to be sent first
            self._deadline = min(self._deadline, now + _LINGER_S)
            if now >= self._deadline:
                transport.abort()
        elif now >= self._deadline:
            self._deadline = _NEVER
            if self._missing or (self.relay is None and self._id and not self._received):
                transport.close()
            else:
                self._refuse(Refused(Reason.TIMEOUT, "the head was not complete in time"))

    def end(self) -> bool:
        """Close it, unless its answer is under way: then false. aiohttp closes its own."""
        if self._answering:
            return False
        if self.relay is None and self._transport is not None:
            self._transport.close()
        return True

    def abort(self) -> None:
        """Close it, answered or not."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()
