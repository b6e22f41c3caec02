"""The page's templates, script and style: beside the package in a checkout, inside it installed."""

from __future__ import annotations

from collections.abc import Mapping
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
    "format.js": "text/javascript",
    "charts.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


def templates_folder() -> Path:
    """The folder of templates, script and style."""
    package = Path(__file__).parent.parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def set_up(app: web.Application) -> None:
    """Set up the templates of an application, and serve the files that they name."""
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
