"""The platform's router: one address that stays, whatever becomes of the process behind it.

Source: Heroku's pages on HTTP routing and its error codes. It adds `X-Request-ID` and
`X-Forwarded-*`, cuts a request after 30 s, and answers an HTML page of its own where the process
does not. It never sends a request twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import aiohttp
from aiohttp import web

CUT_S = 30.0
_PAGE = "<!DOCTYPE html><html><body><h1>Application error</h1>{}</body></html>"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Router:
    """Sends requests on to `port`; `errors` counts its own answers, by code."""

    def __init__(self, port: int) -> None:
        self.url = ""
        self.errors: Counter[str] = Counter()
        self._target = f"http://127.0.0.1:{port}"
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Router]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            self._session = session
            runner = web.ServerRunner(web.Server(self._pass_on, access_log=None))
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                yield self
            finally:
                await runner.cleanup()

    async def _pass_on(self, request: web.BaseRequest) -> web.StreamResponse:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        headers.setdefault("X-Request-ID", str(uuid4()))
        headers |= {
            "Host": request.headers.get("Host", ""), "Via": "1.1 heroku-router",
            "X-Forwarded-For": request.remote or "", "X-Forwarded-Proto": "https",
        }  # fmt: skip
        body = await request.read()
        url = self._target + request.raw_path
        try:
            async with (
                asyncio.timeout(CUT_S),
                self._session.request(request.method, url, data=body, headers=headers) as answer,
            ):
                content = await answer.read()
        except TimeoutError:
            return self._error("H12 Request timeout")
        except aiohttp.ClientConnectorError:
            return self._error("H10 App crashed")
        except (aiohttp.ClientError, OSError):
            return self._error("H13 Connection closed without response")
        sent = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
        return web.Response(status=answer.status, body=content, headers=sent)

    def _error(self, code: str) -> web.Response:
        self.errors[code[:3]] += 1
        return web.Response(status=503, text=_PAGE.format(code), content_type="text/html")
