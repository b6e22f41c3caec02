"""The HTTP server: aiohttp's, with a short way in for `POST /` and a bound on slow heads.

`POST /` is most of the work. aiohttp makes a task, a request and a response object for each, which
costs more than all that datapipe does with it. So a connection begins by serving plain POSTs whose
body is here by itself: one task for the connection, the answer written in one piece. The first
request of another kind (another path, a body still on its way, HTTP/1.0, ...) hands the connection
over to aiohttp for the rest of its life. `make bench` measures it against aiohttp alone.

All of it lives under `AppRunner`, so gunicorn's aiohttp worker can serve it. aiohttp itself has no
time limit for a request's head: `Connection` adds one.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard, cast

from aiohttp import HttpVersion11, web, web_protocol
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_server import Server

from datapipe.errors import Reason, Refused
from datapipe.http import responses
from datapipe.http.body import Headers
from datapipe.http.responses import Answer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SWEEP_S = 0.5


class Door(Protocol):
    """What answers `POST /`; it raises nothing.

    `cors`: a request with an `Origin` wants headers that only aiohttp's way adds.
    """

    cors: bool

    async def post(self, request: web.BaseRequest) -> web.StreamResponse:
        """A request as aiohttp has it."""

    async def post_whole(
        self, headers: Headers, key: str | None, body: bytes, request_id: str
    ) -> Answer:
        """A request whose body is here; `key` is the one of the query."""


def request_id(headers: Mapping[str, str]) -> str:
    """The request's own `X-Request-ID`, or a new one where it has none that can be taken over."""
    given = headers.get("X-Request-ID")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"{random.getrandbits(64):016x}"  # to tell requests apart in logs: no secret


class Runner(web.AppRunner):
    """Runs the application, with a short way in for `POST /`."""

    def __init__(
        self, app: web.Application, door: Door, head_timeout_s: float, **kwargs: Any
    ) -> None:
        super().__init__(app, **kwargs)
        self._door = door
        self._head_timeout_s = head_timeout_s
        self._sweeper: asyncio.Task[None] | None = None

    async def _make_server(self) -> Server:
        plain = await super()._make_server()
        server = _Server(plain, self._door)
        self._sweeper = asyncio.create_task(server.end_slow_heads(self._head_timeout_s))
        return server

    async def shutdown(self) -> None:
        await super().shutdown()
        cast(_Server, self._server).end_idle()

    async def _cleanup_server(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await super()._cleanup_server()


class _Server(Server):
    def __init__(self, plain: Server, door: Door) -> None:
        super().__init__(
            plain.request_handler,
            request_factory=plain.request_factory,
            loop=plain._loop,
            **plain._kwargs,
        )
        self.door = door

    def __call__(self) -> web_protocol.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    def pre_shutdown(self) -> None:
        """Not yet: what comes on open connections while the service stops is to be answered."""

    def end_idle(self) -> None:
        super().pre_shutdown()

    async def end_slow_heads(self, timeout_s: float) -> None:
        """Close connections that began a request and don't get its head done."""
        while True:
            await asyncio.sleep(min(_SWEEP_S, timeout_s / 2))
            oldest = self._loop.time() - timeout_s
            for connection in self.connections:
                cast(Connection, connection).end_if_slow(oldest)


class Connection(web_protocol.RequestHandler):
    """One connection: serves plain POSTs itself, and knows since when it waits for a head."""

    __slots__ = ("_head_since",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_since = self._loop.time()  # a connection that never says a word is one, too

    async def start(self) -> None:
        """Serve requests, one after the other, until the connection ends."""
        if await self._serve_plain_posts():
            await super().start()

    async def _serve_plain_posts(self) -> bool:
        """Until the connection ends, or a request comes that only aiohttp can serve: then true."""
        server = cast(_Server, self._manager)
        while not self._force_close:
            if not self._messages:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            message, payload = self._messages[0]
            if not _is_plain_post(message, payload) or (
                server.door.cors and "Origin" in message.headers
            ):
                return True
            self._take_message()
            server.requests_count += 1
            if not await self._answer(server.door, message, payload):
                break
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            if self._keepalive_handle is None:
                self._keepalive_handle = self._loop.call_at(
                    self._next_keepalive_close_time, self._process_keepalive
                )
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()
        return False

    def _take_message(self) -> None:
        """As aiohttp's own `start` does: make room in the parser, and resume reading."""
        self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()

    async def _answer(self, door: Door, message: RawRequestMessage, payload: StreamReader) -> bool:
        """Answer one plain POST; whether the connection goes on."""
        headers = message.headers
        id = request_id(headers)
        key = message.url.query.get("key") if len(message.path) > 1 else None
        self._request_in_progress = True
        try:
            answer = await door.post_whole(headers, key, payload.read_nowait(), id)
        finally:
            self._request_in_progress = False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        if self.transport is None:
            return False
        self.transport.write(answer.wire(id))
        if self._paused:  # the client does not read its answers: no more of them for now
            try:
                await self._drain_helper()
            except ConnectionError:
                return False
        return not (answer.close or self._close or self._force_close)

    def data_received(self, data: bytes) -> None:
        count = self._request_count
        super().data_received(data)
        if self._messages and (exc := getattr(self._messages[-1][0], "exc", None)) is not None:
            # what can't be parsed: its frames hold it in a circle, with the data, for long
            exc.__traceback__ = exc.__context__ = exc.__cause__ = None
        if self._request_count != count:
            self._head_since = None
        elif self._head_since is None and self._waiter is not None:
            self._head_since = self._loop.time()

    def end_if_slow(self, oldest: float) -> None:
        """Answer 408 and close, if the head began before `oldest`."""
        if self._head_since is None or self._head_since > oldest or self.transport is None:
            return
        self._head_since = None
        if self._waiter is not None and not self._messages:
            detail = "the head was not complete in time"
            answer = responses.refused(Refused(Reason.TIMEOUT, detail))
            self.transport.write(answer.wire(request_id({})))
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp can't parse, or what a handler let through, in the form of all answers."""
        if status >= 500:
            super().handle_error(request, status, exc, message)  # for its log line
            answer = responses.answer(status, 100, "internal server error")
        else:
            detail = " ".join((message or "bad request").split())[:200]
            answer = responses.refused(Refused(Reason.BAD_JSON, detail, status))
        response = answer._replace(close=True).response()
        response.headers["X-Request-ID"] = request_id(request.headers)
        return response


def _is_plain_post(message: Any, payload: StreamReader) -> TypeGuard[RawRequestMessage]:
    """Whether the short way can serve it: a whole `POST /`, nothing out of the ordinary."""
    return (
        isinstance(message, RawRequestMessage)
        and message.method == "POST"
        and (message.path == "/" or message.path.startswith("/?"))
        and message.version >= HttpVersion11  # 1.0 wants to hear that the connection is kept
        and not message.should_close
        and not message.upgrade
        and payload.is_eof()
        and payload.exception() is None
        and "Expect" not in message.headers
    )
