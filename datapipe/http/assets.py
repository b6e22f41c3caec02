"""The page's templates, script and style: beside the package in a checkout, inside it installed."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from datapipe.monitor.feed import News
from datapipe.monitor.overview import SORTS, UNFOLDED, View, overview

if TYPE_CHECKING:
    import jinja2

FILES = {
    "style.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
SECTIONS = (
    "uptime", "summary", "tiles", "dead_count", "dead_news", "pictures", "accounts",
    "mirror_facts", "database_facts", "loads_table", "keys_table", "reasons", "refusals",
)  # fmt: skip
OF_VIEW = ("types", "idle")
_LONG_NAME = re.compile(r"\w{25,}")

Html = Mapping[str, str]

# To render news takes at most a tenth of a core, so that ingest does not suffer by those who look
# on. With very many different views it takes more: the page must not lag behind for longer.
_REST = 9
_REST_MOST_S = 30.0
_VIEWS = 64  # whose HTML is kept for others who look at the same


def templates_folder() -> Path:
    """The folder of templates, script and style."""
    package = Path(__file__).parent.parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def serve_files(app: web.Application) -> None:
    """Serve the files that the page names."""
    for name in FILES:
        app.router.add_get(f"/{name}", _file)


async def _file(request: web.Request) -> web.StreamResponse:
    name = request.path[1:]
    # revalidated each time (mostly 304): page and script must be of the same release
    headers = {"Content-Type": f"{FILES[name]}; charset=utf-8", "Cache-Control": "no-cache"}
    return web.FileResponse(templates_folder() / name, headers=headers)


def at(value: Any, path: str) -> Any:
    """The value at `a.b`, or None; of `a|b` the first that is not None."""
    for one in path.split("|"):
        found = value
        for key in one.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


class Templates:
    """The page as HTML. Used in threads: some milliseconds, and the first use takes longer."""

    @cached_property
    def _environment(self) -> jinja2.Environment:
        # with the templates 4 MB, and most services are looked at by programs alone
        import aiohttp_jinja2
        import jinja2
        import markupsafe

        from datapipe.monitor import charts
        from datapipe.monitor.aggregate import columns
        from datapipe.monitor.formats import FORMATS, REASONS

        def breakable(text: object) -> markupsafe.Markup:
            """Long names are broken at their underscores, where there is no room for them."""
            escaped = str(markupsafe.escape(text))
            broken = _LONG_NAME.sub(lambda name: name[0].replace("_", "_<wbr>"), escaped)
            return markupsafe.Markup(broken)  # nosec  # it is escaped

        environment = aiohttp_jinja2.setup(
            web.Application(),  # of its own: the one that runs takes no more settings
            loader=jinja2.FileSystemLoader(templates_folder()),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["at"] = at
        environment.filters["breakable"] = breakable
        environment.filters["show"] = lambda value, name: FORMATS[name](value)
        environment.globals |= {"charts": charts, "books_columns": columns}
        environment.globals |= {"SORTS": SORTS, "UNFOLDED": UNFOLDED, "REASONS": REASONS}
        return environment

    def page(self, context: Mapping[str, Any]) -> str:
        shown = overview(context["status"]["lanes"], context["view"])
        return self._environment.get_template("status.html").render(context, overview=shown)

    def sections(self, status: Mapping[str, Any]) -> dict[str, str]:
        """The HTML of those that all readers see alike."""
        return {name: self._section(name, status) for name in SECTIONS}

    def of_view(self, status: Mapping[str, Any], view: View) -> dict[str, str]:
        """The HTML of those that show the event types that one has asked for."""
        shown = overview(status["lanes"], view)
        return {name: self._section(name, status, shown) for name in OF_VIEW}

    def _section(self, name: str, *arguments: Any) -> str:
        macro = getattr(self._environment.get_template("sections.html").module, name)
        return str.__str__(macro(*arguments))


class Sections:
    """The sections of the page that live: rendered once for all who read one status in one view."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._rendering = asyncio.Lock()
        self._rest_until = self._rest_at_most_until = 0.0
        self._told: Mapping[str, Any] | None = None  # the status of which those below are
        self._status: Mapping[str, Any] = {}  # the same, with all else that is shown
        self._number = 0  # of that status
        self._shared: Html = {}
        self._of_views: dict[View, Html] = {}

    async def since(
        self, number: int, news: News, refused: Sequence[Mapping[str, Any]], view: View
    ) -> tuple[int, Html]:
        """The number of what is shown now, and the HTML of each section, by its name.

        Nothing is rendered for a reader who has it already.

        Args: number: what the reader has, 0: nothing. refused: the last refusals.
        """
        async with self._rendering:
            if news.status is not self._told and time.monotonic() >= self._rest_until:
                self._told = news.status
                self._status = {**news.status, "refused": refused, "history": news.history}
                self._number += 1
                self._rest_at_most_until = time.monotonic() + _REST_MOST_S
                self._shared = {}
                self._of_views.clear()
            if number == self._number:
                return number, {}
            if not self._shared:
                self._shared = await self._rendered(self._templates.sections, self._status)
            if view not in self._of_views:
                if len(self._of_views) >= _VIEWS:
                    del self._of_views[next(iter(self._of_views))]
                of_view = self._templates.of_view
                self._of_views[view] = await self._rendered(of_view, self._status, view)
            return self._number, {**self._shared, **self._of_views[view]}

    async def _rendered(self, render: Callable[..., Html], *arguments: Any) -> Html:
        def timed() -> tuple[Html, float]:
            began = time.thread_time()  # what waits for a core costs nobody anything
            return render(*arguments), time.thread_time() - began

        html, took_s = await asyncio.to_thread(timed)
        rest_until = max(time.monotonic(), self._rest_until) + took_s * _REST
        self._rest_until = min(rest_until, self._rest_at_most_until)
        return html
