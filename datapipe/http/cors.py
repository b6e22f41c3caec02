"""CORS: the setting `cors_origins` lets scripts of other sites' pages post events.

A browser asks before it sends what a form could not (the preflight, `OPTIONS /`), and shows the
answer to the script only if a header allows it. The browser's credentials are not allowed: an
ingest key comes from the script. Only `POST /` is opened, never the page or what an admin may do.
Source: Fetch standard, "CORS protocol".
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": (
        "Content-Type, Content-Encoding, Idempotency-Key, Authorization, X-Request-ID"
    ),
    "Access-Control-Max-Age": "600",
}


def allow(app: web.Application, origins: Sequence[str]) -> None:
    """Let pages of these origins post; "*" means every page."""

    def allowed(request: web.BaseRequest) -> str | None:
        if "*" in origins:
            return "*"
        origin = request.headers.get("Origin")
        return origin if origin in origins else None

    async def preflight(request: web.Request) -> web.StreamResponse:
        if allowed(request) is None:
            raise web.HTTPForbidden(reason="cors_origins does not name the origin of this page")
        return web.Response(status=204, headers=_PREFLIGHT)

    async def add_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
        if request.path != "/" or request.method not in ("POST", "OPTIONS"):
            return
        response.headers["Vary"] = "Origin"
        if (origin := allowed(request)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-ID"

    app.router.add_route("OPTIONS", "/", preflight)
    app.on_response_prepare.append(add_headers)
