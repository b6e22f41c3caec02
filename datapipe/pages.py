"""All paths but `POST /`: page, status, metrics, health."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp_jinja2
import jinja2
import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from datapipe import answers, openapi
from datapipe.access import Access, AccessDenied
from datapipe.answers import Answer
from datapipe.assets import templates_folder
from datapipe.metrics import Metrics
from datapipe.registry import Registry
from datapipe.server import request_id
from datapipe.status import Status

log = structlog.stdlib.get_logger("datapipe.pages")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}


class Pages:
    """The handlers; they read `Status`."""

    def __init__(
        self,
        status: Status,
        metrics: Metrics,
        registry: Registry,
        access: Access,
    ) -> None:
        self._status = status
        self._metrics = metrics
        self._registry = registry
        self._access = access

    def add_to(self, app: web.Application) -> None:
        """Add the routes, and the templates that they need."""
        aiohttp_jinja2.setup(
            app, loader=jinja2.FileSystemLoader(templates_folder()), autoescape=True
        )
        app.router.add_get("/", self.page)
        app.router.add_get("/style.css", self.style)
        app.router.add_get("/status.json", self.status_json)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        app.router.add_get("/openapi.json", self.openapi)

    async def page(self, request: web.Request) -> web.StreamResponse:
        self._access.may_look(request)
        return aiohttp_jinja2.render_template("status.html", request, self._status.snapshot())

    async def style(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(templates_folder() / "style.css")

    async def status_json(self, request: web.Request) -> web.StreamResponse:
        self._access.may_look(request)
        return answers.plain(self._status.snapshot())

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self._access.may_look(request)
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        return answers.answer(200, 0, "alive").response()

    async def readyz(self, request: web.Request) -> web.StreamResponse:
        why = self._status.not_ready()
        answer = answers.answer(200, 0, "ready") if why is None else answers.answer(503, 9, why)
        return answer.response()

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        return answers.plain(openapi.document(self._registry))


@web.middleware
async def errors_are_answers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error leaves as JSON with `status_code` and `status_message`."""
    try:
        return await handler(request)
    except AccessDenied as exc:
        headers = answers.AUTHENTICATE if exc.status == 401 else {}
        return answers.answer(exc.status, 8, exc.detail, headers=headers).response()
    except web.HTTPException as exc:
        response = answers.answer(exc.status, exc.status, exc.reason).response()
        for name in ("Allow", "Location"):
            if name in exc.headers:
                response.headers[name] = exc.headers[name]
        return response
    except Exception:
        return fault(request_id(request.headers), request.path).response()


def fault(request_id: str, path: str) -> Answer:
    """The answer to a fault of ours; call it where the exception is caught."""
    log.exception("fault", request_id=request_id, path=path)
    return answers.answer(500, 100, f"a fault of ours; request id {request_id}")


async def add_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """What every answer bears."""
    response.headers.setdefault("X-Request-ID", request_id(request.headers))
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
