"""What an admin may do: load now, dead letters, unknown events."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from datapipe.errors import Reason, Refused
from datapipe.http import responses
from datapipe.http.auth import Access
from datapipe.monitor.peers import Peers
from datapipe.pipeline.dead_letters import DeadLetters, selection_of, storable
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.unknown import ALL, Unknown
from datapipe.pipeline.unknown import selection_of as selection_of_unknown
from datapipe.sinks import Selection

_LETTERS = 100  # shown unless `limit` says how many
_LETTERS_MOST = 1000


class Admin:
    """The handlers; each asks `Access` first."""

    def __init__(
        self, loader: Loader, dead: DeadLetters, unknown: Unknown, access: Access, peers: Peers
    ) -> None:
        self._peers = peers
        self._loader = loader
        self._dead = dead
        self._unknown = unknown
        self._access = access

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/load", self.load)
        app.router.add_get("/dead", self.look)
        app.router.add_get("/unknown", self.look_at_unknown)
        for name, shelf, select in (
            ("dead", self._dead, selection_of), ("unknown", self._unknown, selection_of_unknown),
        ):  # fmt: skip
            app.router.add_post(f"/{name}/replay", partial(self._change, shelf.replay, select))
            app.router.add_post(f"/{name}/drop", partial(self._change, shelf.drop, select))

    async def load(self, request: web.Request) -> web.StreamResponse:
        """`POST /load`: one try for each lane, or for `?lane=` alone."""
        self._access.may_act(request)
        lane = request.query.get("lane")
        accept = request.query.get("accept")
        if accept not in (None, "dead"):
            raise Refused(Reason.BAD_VALUE, "accept: must be 'dead'")
        if lane is not None and lane not in self._loader.lanes:
            detail = f"lane: there is no event type {lane[:64]!r}"
            raise Refused(Reason.UNSUPPORTED_EVENT, detail, 404)
        # all processes load at once; each answers for itself
        own, heard = await asyncio.gather(
            self.load_own(lane, accept == "dead"),
            self._peers.ask("POST", "/load", dict(request.query)),
        )
        loaded: Counter[str] = Counter()
        failed: dict[str, str] = {}
        for answer in (own, *heard.answers):
            loaded.update(answer["loaded"])
            failed |= answer["failed"]
        if "text/html" in request.headers.get("Accept", ""):  # the page's button, without script
            return web.Response(status=303, headers={"Location": "./"})
        silent = {"silent": heard.silent} if heard.silent else {}
        return responses.plain({"loaded": loaded, "failed": failed, **silent})

    async def load_own(self, lane: str | None, accept_dead: bool) -> dict[str, Any]:
        """Load now, in this process."""
        loaded, failed = await self._loader.load_now(
            None if lane is None else [lane], accept_dead=accept_dead
        )
        return {"loaded": loaded, "failed": failed}

    async def look(self, request: web.Request) -> web.StreamResponse:
        """`GET /dead`."""
        self._access.may_act(request)
        limit = _limit(request)
        lane, sqlstate = request.query.get("lane"), request.query.get("sqlstate")
        if not storable((lane or "") + (sqlstate or "")):
            detail = "lane, sqlstate: must be text that a database can hold"
            raise Refused(Reason.BAD_VALUE, detail)
        selection = Selection(lane=lane, sqlstate=sqlstate)
        return responses.plain(await self._dead.look(selection, limit))

    async def look_at_unknown(self, request: web.Request) -> web.StreamResponse:
        """`GET /unknown`."""
        self._access.may_act(request)
        limit, name = _limit(request), request.query.get("event_name")
        if not storable(name or ""):
            raise Refused(Reason.BAD_VALUE, "event_name: must be text that a database can hold")
        return responses.plain(await self._unknown.look(replace(ALL, lane=name), limit))

    async def _change(
        self,
        change: Callable[[Selection], Awaitable[Any]],
        select: Callable[[Any], Selection],
        request: web.Request,
    ) -> web.StreamResponse:
        """`POST /dead/replay`, `POST /dead/drop`; the same of unknown events."""
        self._access.may_act(request)
        body = await request.read()
        form = request.content_type == "application/x-www-form-urlencoded"  # the page's buttons
        form = form and not body.lstrip().startswith(b"{")  # or `curl -d`, which says so, too
        try:
            wanted = await request.post() if form else msgspec.json.decode(body)
            selection = select(wanted)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
            raise Refused(Reason.BAD_JSON, f"not JSON: {exc}") from None
        counts = await change(selection)
        if form:
            section = request.path.split("/")[-2]
            return web.Response(status=303, headers={"Location": f"../#{section}"})
        return responses.plain(counts)


def _limit(request: web.Request) -> int:
    """How many to show. Raises: Refused: the query asks for no such number."""
    try:
        limit = int(request.query.get("limit", _LETTERS))
    except ValueError:
        limit = -1
    if not 0 <= limit <= _LETTERS_MOST:
        raise Refused(Reason.BAD_VALUE, f"limit: must be a whole number up to {_LETTERS_MOST}")
    return limit
