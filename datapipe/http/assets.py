"""The page's templates, script and style: beside the package in a checkout, inside it installed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    import jinja2

FILES = {
    "style.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
SECTIONS = (
    "uptime", "summary", "tiles", "books_table", "lanes_table", "chart_grid", "mirror_facts",
    "database_facts", "loads_table", "keys_table", "reasons", "refusals",
)  # fmt: skip


# None is rendered for so many times as long as the last took: thousands of lanes take a second, and
# ingest must not suffer by those who look on.
_REST = 9


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
    """The page as HTML. Used in threads: thousands of lanes take long, as does the first use."""

    @cached_property
    def _environment(self) -> jinja2.Environment:
        # with the templates 4 MB, and most services are looked at by programs alone
        import aiohttp_jinja2
        import jinja2

        from datapipe.monitor import charts
        from datapipe.monitor.aggregate import columns
        from datapipe.monitor.formats import FORMATS

        environment = aiohttp_jinja2.setup(
            web.Application(),  # of its own: the one that runs takes no more settings
            loader=jinja2.FileSystemLoader(templates_folder()),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["at"] = at
        environment.filters["show"] = lambda value, name: FORMATS[name](value)
        environment.globals |= {"charts": charts, "books_columns": columns}
        return environment

    def page(self, context: Mapping[str, Any]) -> str:
        return self._environment.get_template("status.html").render(context)

    def sections(self, status: Mapping[str, Any]) -> dict[str, str]:
        """The HTML of each; without new readings the charts stay as they are."""
        macros = self._environment.get_template("sections.html").module
        shown = [name for name in SECTIONS if name != "chart_grid" or status["history"]]
        return {name: str.__str__(getattr(macros, name)(status)) for name in shown}


class Sections:
    """The sections of the page that live: rendered once for all readers of one status."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._rendering = asyncio.Lock()
        self._rest_until = 0.0
        self._status: Mapping[str, Any] = {}  # the last that was rendered
        self._history: Mapping[str, Any] | None = None  # one that was not rendered yet
        self._number = 0  # of renderings
        self._html: dict[str, tuple[int, str]] = {}  # by section; the number since which it is so

    async def changed(
        self, status: Mapping[str, Any], refused: Sequence[Mapping[str, Any]], since: int
    ) -> tuple[int, dict[str, str]]:
        """The number of the last rendering, and the HTML of what has changed after that one.

        Args: refused: the last refusals. since: 0 gives all sections.
        """
        async with self._rendering:
            began = time.monotonic()
            if status is not self._status:
                self._history = status.get("history", self._history)
            if status is not self._status and began >= self._rest_until:
                shown = {**status, "refused": refused, "history": self._history}
                html = await asyncio.to_thread(self._templates.sections, shown)
                self._rest_until = time.monotonic() + (time.monotonic() - began) * _REST
                self._status, self._history = status, None
                self._number += 1
                for name, text in html.items():
                    if self._html.get(name, (0, ""))[1] != text:
                        self._html[name] = self._number, text
        changed = {name: text for name, (at, text) in self._html.items() if at > since}
        return self._number, changed
