"""All paths that only show: page, streams, status, metrics, health."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from aiohttp_sse import sse_response

from datapipe.errors import Busy, LaneBlocked, Refused, SinkUnavailable
from datapipe.events.registry import Registry
from datapipe.http import assets, openapi, responses
from datapipe.http.auth import Access
from datapipe.monitor.feed import Feed, News
from datapipe.monitor.metrics import Metrics
from datapipe.monitor.overview import View
from datapipe.monitor.status import Status
from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.pipeline.unknown import Unknown

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a form's Origin would be "null"
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}
_RETRY_MS = 1000  # until a page that lost its stream reconnects
_SEND_TIMEOUT_S = 30.0  # until a page that reads nothing is disconnected
_AT_ONCE = 4  # answers being made of all numbers: with a thousand event types each takes 5 MB


@dataclass(slots=True)
class Reader:
    """Who follows the sections of the page.

    Attributes: number: see `Sections.since`. seen: hashes, for thousands may look at once.
    """

    view: View
    number: int = 0
    seen: dict[str, int] = field(default_factory=dict)


@dataclass
class Pages:
    """The handlers; they read `Status`."""

    status: Status
    feed: Feed
    numbers: Metrics
    registry: Registry
    access: Access
    dead: DeadLetters
    unknown: Unknown

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        assets.serve_files(app)
        self._templates = assets.Templates()
        self._sections = assets.Sections(self._templates)
        self._encoded: tuple[News | None, str] = (None, "")
        self._turns = asyncio.Semaphore(_AT_ONCE)
        app.router.add_get("/", self.page)
        app.router.add_get("/stream", self.stream, allow_head=False)
        app.router.add_get("/status.json", self.status_json)
        app.router.add_get("/refused", self.refused)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        app.router.add_get("/openapi.json", self.openapi)

    async def page(self, request: web.Request) -> web.StreamResponse:
        self.access.may_look(request)
        denied = self.access.why_not(request)
        await self.status.refresh()
        dead = unknown = None
        if not denied:
            dead, unknown = await asyncio.gather(self.dead.shown(), self.unknown.shown())
        async with self._turns:
            context = {
                "status": await self.status.whole() | {"refused": self.status.records.refusals()},
                "view": View.of(request.query),
                "denied": denied.detail if denied else None,
                "dead": dead,
                "unknown": unknown,
                "keeps_unknown": self.unknown.kept,
            }
            text = await asyncio.to_thread(self._templates.page, context)
            del context
        headers = {"Cache-Control": "no-store"}
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """What `/status.json` shows, as server-sent events, one a second, until the service stops.

        With `?sections`, for the page's own script: the HTML of each section that has changed, as
        the page's own query has it.
        """
        self.access.may_look(request)
        if self.feed.ended:
            raise Busy("shutting down")
        async with sse_response(request, send_timeout=_SEND_TIMEOUT_S) as response:
            reader = Reader(View.of(request.query))
            # the client has left, or a reload has changed the key: nothing to do
            with suppress(ConnectionResetError, TimeoutError, Refused):
                async with aclosing(self.feed.listen()) as news:
                    async for each in news:
                        self.access.may_look(request)
                        if "sections" in request.query:
                            changed = await self._changed(each, reader, request)
                            text = msgspec.json.encode(changed).decode()
                        else:
                            text = self._json(each)
                        await response.send(text, retry=_RETRY_MS)
        return response

    async def _changed(self, news: News, reader: Reader, request: web.Request) -> dict[str, str]:
        refused = self.status.records.refusals()
        reader.number, html = await self._sections.since(reader.number, news, refused, reader.view)
        may_act = self.access.why_not(request) is None
        shown = {id: text for id, text in html.items() if may_act or id != "refusals"}
        changed = {id: text for id, text in shown.items() if reader.seen.get(id) != hash(text)}
        reader.seen |= {id: hash(text) for id, text in changed.items()}
        return changed

    def _json(self, news: News) -> str:
        """Encoded once for all readers."""
        known, text = self._encoded
        if known is None or known.status is not news.status or known.fresh != news.fresh:
            told = {**news.status, "history": news.history} if news.fresh else news.status
            text = msgspec.json.encode(told).decode()
            self._encoded = news, text
        return text

    async def status_json(self, request: web.Request) -> web.StreamResponse:
        self.access.may_look(request)
        await self.status.refresh()
        async with self._turns:
            return responses.plain(await self.status.whole())

    async def refused(self, request: web.Request) -> web.StreamResponse:
        self.access.may_act(request)
        return responses.plain({"refused": self.status.records.refusals()})

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self.access.may_look(request)
        async with self._turns:
            status, histograms = await self.status.of_data_dir()
            # in a thread: thousands of lanes take their time
            text = await asyncio.to_thread(self.numbers.text, status, histograms)
            del status
        from prometheus_client import CONTENT_TYPE_LATEST  # which that has imported

        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        return responses.answer(200, 0, "alive").response()

    async def readyz(self, request: web.Request) -> web.StreamResponse:
        if (why := self.status.not_ready()) is not None:
            raise Busy(why)
        return responses.answer(200, 0, "ready").response()

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        return responses.plain(openapi.document(self.registry))


@web.middleware
async def errors_are_answers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error leaves as JSON with `status_code` and `status_message`."""
    try:
        return await handler(request)
    except Refused as exc:
        return responses.refused(exc).response()
    except (SinkUnavailable, LaneBlocked) as exc:
        return responses.refused(Busy(f"the database can't do it now: {exc}")).response()
    except web.HTTPException as exc:
        response = responses.answer(exc.status, exc.status, exc.reason).response()
        for name in ("Allow", "Location", "Vary"):
            if name in exc.headers:
                response.headers[name] = exc.headers[name]
        return response
    except Exception as exc:
        id = responses.request_id(request.headers)
        return responses.internal_error(exc, request.headers, id, request.path).response()


async def add_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Headers of every answer; what answers a POST of events has the same as elsewhere."""
    response.headers.pop("Server", None)
    if "X-Request-ID" in response.headers:
        return
    response.headers["X-Request-ID"] = responses.request_id(request.headers)
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
