"""The files of deploy/, with the places that they name moved into a test's folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.service import ROOT


def moved(name: str, folder: Path, places: Mapping[str, str]) -> Path:
    """A copy of deploy/`name` there, changed as said: each text is in it, and only those differ."""
    text = (ROOT / "deploy" / name).read_text()
    for old, new in places.items():
        assert old in text, f"{name} does not hold {old!r}"
        text = text.replace(old, new)
    path = folder / Path(name).name
    path.write_text(text)
    return path


def installed(folder: Path) -> str:
    """A folder as the docs make it: this checkout, and an environment in `.venv`."""
    place = folder / "opt"
    place.mkdir()
    for entry in ("datapipe", "templates", "tests"):
        (place / entry).symlink_to(ROOT / entry)
    (place / ".venv").symlink_to(sys.prefix)
    return str(place)


async def status_of(url: str) -> dict[str, Any]:
    """What the service tells. Raises: aiohttp.ClientError: nobody answers."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/status.json") as response:
        found: dict[str, Any] = await response.json()
        return found
