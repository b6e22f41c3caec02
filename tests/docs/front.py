"""A proxy before the service that is busy first, then loses an answer, and then behaves."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

RETRY_AFTER_S = 1
_BUSY: dict[str, tuple[int, dict[str, Any]]] = {  # nothing has room, or one lane has none
    "busy": (503, {"status_code": 9}),
    "full": (207, {"status_code": 1, "accepted": 1, "rejected": 1, "busy": ["purchase"]}),
}
_HOP = ("Host", "Content-Length", "Transfer-Encoding", "Connection")


@dataclass
class Try:
    """One POST with a key, as the client sent it; `at` is of the monotonic clock, in seconds."""

    at: float
    key: str
    body: bytes


@dataclass
class Front:
    """Attributes: tries: all POSTs with a key. faults: what becomes of the next ones."""

    url: str = ""
    tries: list[Try] = field(default_factory=list)
    faults: list[str] = field(default_factory=lambda: ["busy", "cut"])


@asynccontextmanager
async def front(service: str) -> AsyncIterator[Front]:
    """One before the service of this URL; a fault costs a POST that has a key."""
    made = Front()

    async def pass_on(request: web.Request) -> web.StreamResponse:
        body, key = await request.read(), request.headers.get("Idempotency-Key")
        fault = ""
        if key is not None:
            made.tries.append(Try(time.monotonic(), key, body))
            fault = made.faults.pop(0) if made.faults else ""
        if fault in _BUSY:
            return busy(request.headers.get("Origin", "*"), *_BUSY[fault])
        headers = {k: v for k, v in request.headers.items() if k not in _HOP}
        async with session.request(
            request.method, f"{service}{request.path_qs}", data=body, headers=headers
        ) as answer:
            content = await answer.read()
            if fault == "cut" and request.transport is not None:
                request.transport.abort()
            kept = {k: v for k, v in answer.headers.items() if k not in _HOP}
            return web.Response(status=answer.status, body=content, headers=kept)

    app = web.Application()
    app.router.add_route("*", "/", pass_on)
    async with aiohttp.ClientSession() as session, TestServer(app) as server:
        made.url = str(server.make_url("/"))
        yield made


def busy(origin: str, status: int, more: dict[str, Any]) -> web.Response:
    """As a service that has no room; as its own, for a page of another origin to read."""
    headers = {
        "Retry-After": str(RETRY_AFTER_S), "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "Preference-Applied, Retry-After, X-Request-ID",
        "Vary": "Origin",
    }  # fmt: skip
    response = web.json_response(
        {"status_message": "no room", **more}, status=status, headers=headers
    )
    # curl and browsers send again at once when a connection breaks that had served before
    response.force_close()
    return response
