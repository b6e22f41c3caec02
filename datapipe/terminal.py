"""What the commands show: with colours on a terminal, as plain lines otherwise."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from datapipe import formats
from datapipe.together import BOOKS

_LOOK_S = 0.2  # how often progress is looked at
_TELL_S = 5.0  # and told, where lines can't be overwritten
_LANES = (*BOOKS, "oldest", "next load", "state")


def show_status(status: Mapping[str, Any], console: Console | None = None) -> None:
    """Print `/status.json` at a glance."""
    console = console or Console(highlight=False)
    summary = status["summary"]
    style = "green" if summary["state"] == "healthy" else "bold red"
    for text in (summary["text"], *summary["also"]):
        console.print(Text(_clean(text), style=style), soft_wrap=True)
    rows = [_lane(name, lane) for name, lane in status["lanes"].items()]
    books = status["books"]
    balance = "balanced" if books["balanced"] else "NOT balanced"
    rows.append(_lane("all lanes", books | {"state": balance}))
    if console.is_terminal:
        console.print(_table(rows))
    else:
        for row in rows:
            pairs = zip(_LANES, row[1:], strict=True)
            told = ", ".join(f"{key} {value}" for key, value in pairs if value != formats.NOTHING)
            console.print(Text(f"{row[0]}: {told}"), soft_wrap=True)
    for line in _facts(status):
        console.print(Text(_clean(line)), soft_wrap=True)


def _lane(name: str, lane: Mapping[str, Any]) -> list[str]:
    blocked = lane.get("blocked") or lane.get("error")
    state = f"{lane['state']}: {blocked}" if blocked else lane["state"]
    numbers = [formats.count(lane[key]) for key in BOOKS]
    oldest = lane.get("oldest_seconds") if lane["waiting"] else None
    times = [formats.seconds(oldest), formats.seconds(lane.get("next_load_seconds"))]
    return [_clean(name), *numbers, *times, _clean(state)]


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("lane", no_wrap=True)
    for name in _LANES[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(_LANES[-1])
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _facts(status: Mapping[str, Any]) -> list[str]:
    mirror, database = status["mirror"], status["database"]
    used = f"{formats.size(mirror['bytes'])} of {formats.size(mirror['max_bytes'])} used"
    refused = ", ".join(f"{why} {count:,}" for why, count in sorted(status["rejected"].items()))
    return [
        f"mirror: {mirror['kind']}, {formats.up(mirror['up'])}, {used}{_error(mirror)}",
        f"database: PostgreSQL {database['version'] or '(not reached yet)'}, "
        f"{formats.up(database['up'])}{_error(database)}",
        f"refused at the door: {refused or 'nothing'}",
        f"datapipe {status['version']}, up {formats.seconds(status['uptime_seconds'])}",
    ]


def _error(part: Mapping[str, Any]) -> str:
    return f": {part['error']}" if part["error"] else ""


def _clean(text: str) -> str:
    """Without the control characters that would steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


@asynccontextmanager
async def progress(what: str, left: Callable[[], int]) -> AsyncIterator[None]:
    """Show on stderr how `left` falls to nothing, as long as the block lasts."""
    console = Console(stderr=True)
    task = asyncio.create_task(
        _bar(what, left, console) if console.is_terminal else _lines(what, left)
    )
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _bar(what: str, left: Callable[[], int], console: Console) -> None:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        total = left()
        shown = bar.add_task(what, total=total)
        while True:
            total = max(total, left())
            bar.update(shown, total=total, completed=total - left())
            await asyncio.sleep(_LOOK_S)


async def _lines(what: str, left: Callable[[], int]) -> None:
    while True:
        await asyncio.sleep(_TELL_S)
        print(f"{what}: {left():,} left", file=sys.stderr, flush=True)
