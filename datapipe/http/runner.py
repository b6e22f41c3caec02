"""The runner: aiohttp's, with a `Server` of our own before its server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, cast

from aiohttp import web

from datapipe.http.heads import PATHS, Heads
from datapipe.http.ingest import Ingest
from datapipe.http.server import KEEPALIVE_S, Connection, Server


@web.middleware
async def report_answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Send the answer, and report that it is out; must be the outermost middleware."""
    began, keep_alive = perf_counter(), False
    try:
        response = await handler(request)
        with suppress(ConnectionError):  # the client has left: aiohttp meets it again
            if not isinstance(response, web.FileResponse):  # which can be sent but once, by aiohttp
                await response.prepare(request)
                await response.write_eof()
            keep_alive = response.keep_alive is not False
        return response
    finally:
        transport = request.transport
        connection = None if transport is None else transport.get_protocol()
        if isinstance(connection, Connection):
            is_post = request.method == "POST" and request.path in PATHS
            connection.answered(keep_alive, perf_counter() - began if is_post else None)


class Runner(web.AppRunner):
    """Runs the application behind a `Server`.

    Args:
        handler: called once the application has started.
        kwargs: of `web.AppRunner`.
    """

    def __init__(
        self,
        app: web.Application,
        handler: Callable[[], Ingest],
        head_timeout_s: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(app, keepalive_timeout=KEEPALIVE_S, **kwargs)
        self.heads = Heads()
        self._handler = handler
        self._head_timeout_s = head_timeout_s
        self._own: Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def server(self) -> Any:
        """The protocol factory that sites, and gunicorn's worker, take."""
        return self._own

    async def setup(self) -> None:
        await super().setup()
        fallback = cast(web.Server, super().server)
        self._own = Server(self._handler(), fallback, self.heads, self._head_timeout_s)
        self._sweeper = asyncio.create_task(self._own.end_late())

    async def cleanup(self) -> None:
        """Answer what comes on open connections while the application shuts down, then end."""
        try:
            for site in self.sites:
                await site.stop()
            if self._own is not None and self._sweeper is not None:
                await self.shutdown()  # `super` calls it once more
                await self._own.close()
                self._sweeper.cancel()
        finally:
            await super().cleanup()
