"""The HTTP server: aiohttp's, with a short way in for `POST /` and a bound on slow heads.

`POST /` is most of the work, so it goes straight to its handler, past router and middlewares; all
else takes aiohttp's usual way. Both live under `AppRunner`, so gunicorn's aiohttp worker can serve
them. aiohttp itself has no time limit for a request's head: `Connection` adds one.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web, web_protocol
from aiohttp.web_server import Server

from datapipe import answers
from datapipe.errors import EventRejected

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SWEEP_S = 0.5

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def request_id(request: web.BaseRequest) -> str:
    """The request's own `X-Request-ID`, or a new one where it has none that can be taken over."""
    given = request.headers.get("X-Request-ID")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(8)


class Runner(web.AppRunner):
    """Runs the application with `post` as the short way in for `POST /`."""

    def __init__(
        self, app: web.Application, post: Handler, head_timeout_s: float, **kwargs: Any
    ) -> None:
        super().__init__(app, **kwargs)
        self._post = post
        self._head_timeout_s = head_timeout_s
        self._sweeper: asyncio.Task[None] | None = None

    async def _make_server(self) -> Server:
        plain = await super()._make_server()
        server = _Server(plain, self._post)
        self._sweeper = asyncio.create_task(server.end_slow_heads(self._head_timeout_s))
        return server

    async def _cleanup_server(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await super()._cleanup_server()


class _Server(Server):
    def __init__(self, plain: Server, post: Handler) -> None:
        super().__init__(
            self._route,
            request_factory=plain.request_factory,
            loop=plain._loop,
            **plain._kwargs,
        )
        self._post = post
        self._rest = plain.request_handler

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        if (
            request.method == "POST"
            and request.rel_url.raw_path == "/"
            and "Expect" not in request.headers
        ):
            return await self._post(request)
        return await self._rest(request)

    def __call__(self) -> web_protocol.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    async def end_slow_heads(self, timeout_s: float) -> None:
        """Close connections that began a request and don't get its head done."""
        while True:
            await asyncio.sleep(min(_SWEEP_S, timeout_s / 2))
            oldest = self._loop.time() - timeout_s
            for connection in self.connections:
                cast(Connection, connection).end_if_slow(oldest)


class Connection(web_protocol.RequestHandler):
    """One connection; knows since when it waits for the rest of a head."""

    __slots__ = ("_head_since",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_since = self._loop.time()  # a connection that never says a word is one, too

    def data_received(self, data: bytes) -> None:
        count = self._request_count
        super().data_received(data)
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
            body = b'{"status_code": 3, "status_message": "the head was not complete in time"}'
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
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
            response: web.StreamResponse = answers.answer(status, 100, "a fault of ours")
        else:
            detail = " ".join((message or "bad request").split())[:200]
            response = answers.rejected(EventRejected(3, "bad_json", detail, status))
        response.headers["X-Request-ID"] = request_id(request)
        response.force_close()
        return response
