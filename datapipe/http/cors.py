"""CORS: the setting `cors_origins` lets scripts of other sites' pages post events.

A browser asks before it sends what a form could not (the preflight, `OPTIONS`), and shows the
answer to the script only if a header allows it. The browser's credentials are not allowed: an
ingest key comes from the script. Only POSTs of events are opened, never the page or what an admin
may do.
Source: Fetch standard, "CORS protocol".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiohttp import web

from datapipe.http.heads import PATHS
from datapipe.http.responses import Answer

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": (
        "Content-Type, Content-Encoding, Idempotency-Key, Prefer, Authorization, X-Request-ID, "
        "traceparent, tracestate"
    ),
    "Access-Control-Max-Age": "600",
}


class Cors:
    """Decides by the settings alone; `"*"` among the origins means every page."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.reload(origins)

    def reload(self, origins: Sequence[str]) -> None:
        """From now on these count."""
        self._origins = frozenset(origins)

    def headers(self, origin: str | None) -> dict[str, str]:
        """What an answer to a page of this origin says about it; None: it is no page."""
        allowed = "*" if "*" in self._origins else origin if origin in self._origins else None
        if allowed is None:
            return {"Vary": "Origin"}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": allowed,
            "Access-Control-Expose-Headers": "Preference-Applied, Retry-After, X-Request-ID",
        }

    def apply(self, answer: Answer, headers: Mapping[str, str]) -> Answer:
        """An answer to a request with these headers, with what it says about its origin."""
        more = self.headers(headers.get("Origin")) if self._origins else None
        return answer._replace(headers={**answer.headers, **more}) if more else answer

    def add_to(self, app: web.Application) -> None:
        """Answer preflights; while no page may post there is no such method."""

        async def preflight(request: web.Request) -> web.StreamResponse:
            if not self._origins:
                page = ["GET", "HEAD"] if request.path == "/" else []
                raise web.HTTPMethodNotAllowed("OPTIONS", [*page, "POST"])
            headers = self.headers(request.headers.get("Origin"))
            if "Access-Control-Allow-Origin" not in headers:
                reason = "cors_origins does not name the origin of this page"
                raise web.HTTPForbidden(reason=reason, headers=headers)
            return web.Response(status=204, headers=_PREFLIGHT | headers)

        async def name_methods(request: web.Request, response: web.StreamResponse) -> None:
            if response.status == 405 and not self._origins:
                named = response.headers.get("Allow", "").split(",")
                response.headers["Allow"] = ",".join(m for m in named if m != "OPTIONS")

        for path in PATHS:
            app.router.add_route("OPTIONS", path, preflight)
        app.on_response_prepare.append(name_methods)
