"""The page's templates, script and style: beside the package in a checkout, inside it installed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp_jinja2
import jinja2
from aiohttp import web

from datapipe.monitor import charts
from datapipe.monitor.formats import FORMATS

FILES = {
    "style.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
SECTIONS = (
    "uptime", "summary", "tiles", "books_table", "lanes_table", "chart_grid", "mirror_facts",
    "database_facts", "loads_table", "reasons", "refusals",
)  # fmt: skip


def templates_folder() -> Path:
    """The folder of templates, script and style."""
    package = Path(__file__).parent.parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def set_up(app: web.Application) -> jinja2.Environment:
    """Make the templates known to an application, and serve the files that they name."""
    environment = aiohttp_jinja2.setup(
        app,
        loader=jinja2.FileSystemLoader(templates_folder()),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["at"] = at
    environment.filters["show"] = lambda value, name: FORMATS[name](value)
    environment.globals["charts"] = charts
    for name in FILES:
        app.router.add_get(f"/{name}", _file)
    return environment


async def _file(request: web.Request) -> web.StreamResponse:
    name = request.path[1:]
    # asked for anew each time (and mostly answered 304): page and script must be of one release
    headers = {"Content-Type": f"{FILES[name]}; charset=utf-8", "Cache-Control": "no-cache"}
    return web.FileResponse(templates_folder() / name, headers=headers)


def at(value: Any, path: str) -> Any:
    """What lies at `a.b`, or None; of `a|b` the first that holds something."""
    for one in path.split("|"):
        found = value
        for key in one.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


class Sections:
    """The sections of the page that live: rendered once for all readers of one status."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._macros = environment.get_template("sections.html").module
        self._rendering = asyncio.Lock()
        self._status: Mapping[str, Any] = {}
        self._number = 0  # of renderings
        self._html: dict[str, tuple[int, str]] = {}  # by section; the number since which it is so

    async def changed(
        self, status: Mapping[str, Any], refused: Sequence[Mapping[str, Any]], since: int
    ) -> tuple[int, dict[str, str]]:
        """The HTML of each section that has changed after that rendering, and the last's number.

        Args: refused: the last refusals. since: 0 gives all sections.
        """
        async with self._rendering:
            if status is not self._status:
                # in a thread: thousands of lanes take their time
                html = await asyncio.to_thread(self._render, {**status, "refused": refused})
                self._status, self._number = status, self._number + 1
                for name, text in html.items():
                    if self._html.get(name, (0, ""))[1] != text:
                        self._html[name] = self._number, text
        changed = {name: text for name, (at, text) in self._html.items() if at > since}
        return self._number, changed

    def _render(self, status: Mapping[str, Any]) -> dict[str, str]:
        shown = [name for name in SECTIONS if name != "chart_grid" or "history" in status]
        return {name: str.__str__(getattr(self._macros, name)(status)) for name in shown}
