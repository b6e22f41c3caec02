"""What the commands print: plain lines, with a little colour on a terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from datapipe.monitor import formats
from datapipe.monitor.aggregate import columns
from datapipe.pipeline.tasks import background

_MANY = 20  # event types: of more, those that had no events are only counted
_BOLD, _RED, _GREEN = "1", "1;31", "32"  # Source: ECMA-48, "Select Graphic Rendition"


def show_status(status: Mapping[str, Any]) -> None:
    """Print `/status.json` at a glance."""
    summary, books = status["summary"], status["books"]
    colour = _GREEN if summary["state"] == "healthy" else _RED
    said = [summary["text"], *summary["also"]]
    for text in said:
        _print(text, colour)
    balance = f"{'' if books['balanced'] else 'NOT '}accounted for"
    keys = [key for _, key in columns(status["mirror"].get("shared", False)) if key != "balanced"]
    head = ("type", *(key.replace("_", " ") for key in keys), "oldest", "next load", "state")
    lanes = status["lanes"]
    idle = (
        {name for name, lane in lanes.items() if _idle(lane, keys)} if len(lanes) > _MANY else set()
    )
    shown = (name for name in lanes if name not in idle)
    rows = [head, *(_lane(name, lanes[name], keys, said) for name in shown)]
    rows.append(_lane("all types", books | {"state": balance}, keys, said))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, *numbers, state = row
        aligned = (text.rjust(width) for text, width in zip(numbers, widths[1:-1], strict=True))
        line = "  ".join((name.ljust(widths[0]), *aligned, state))
        _print(line, _BOLD if row is head else "")
    if idle:
        _print(f"{len(idle):,} more types had no events since the start")
    for line in _facts(status, said):
        _print(line)


def _print(text: str, style: str = "") -> None:
    """One line."""
    line = printable(text)
    coloured = style and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[{style}m{line}\x1b[m" if coloured else line)


def printable(text: str) -> str:
    """Without the control characters that would steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def _idle(lane: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return lane["state"] == "empty" and not any(lane[key] for key in keys)


def _lane(
    name: str, lane: Mapping[str, Any], keys: Sequence[str], said: Sequence[str]
) -> tuple[str, ...]:
    state = lane["state"] + _why(lane.get("blocked") or lane.get("error"), said)
    oldest = lane.get("oldest_seconds") if lane["waiting"] else None
    times = (formats.seconds(oldest), formats.seconds(lane.get("next_load_seconds")))
    return name, *(formats.count(lane[key]) for key in keys), *times, state


def _facts(status: Mapping[str, Any], said: Sequence[str]) -> list[str]:
    mirror, database = status["mirror"], status["database"]
    name = formats.kind(mirror["kind"])
    used = f"{formats.size(mirror['bytes'])} of {formats.size(mirror['max_bytes'])} used"
    product = database.get("product", "version")  # an older service names none
    rejected = ", ".join(
        f"{formats.reason(why)} {count:,}" for why, count in sorted(status["rejected"].items())
    )
    return [
        f"{name}: {formats.up(mirror['up'])}, {used}{_why(mirror['error'], said)}",
        f"database: {product} {database['version'] or '(not reached yet)'}, "
        f"{formats.up(database['up'])}{_why(database['error'], said)}",
        f"rejected: {rejected or 'nothing'}",
        f"datapipe {status['version']}, up {formats.seconds(status['uptime_seconds'])}"
        f"{_processes(status)}",
    ]


def _processes(status: Mapping[str, Any]) -> str:
    answered, silent, ended = status["processes"], status.get("silent"), status.get("ended")
    if answered == 1 and not (silent or ended):
        return ""
    text = f", {answered} process{'' if answered == 1 else 'es'}"
    text += f", silent: {', '.join(silent)}" if silent else ""
    return text + (f", ended: {', '.join(ended)}" if ended else "")


def _why(error: str | None, said: Sequence[str]) -> str:
    """An error, unless a sentence at the top has named it."""
    named = not error or any(error.rstrip(".") in text for text in said)
    return "" if named else f": {error}"


def print_json(value: Any) -> None:
    """For programs: one JSON value, indented."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


@asynccontextmanager
async def progress(what: str, left: Callable[[], int]) -> AsyncIterator[None]:
    """Show on stderr how much is `left`, as long as the block lasts."""
    over, end, every_s = ("\r\x1b[K", "", 0.2) if sys.stderr.isatty() else ("", "\n", 5.0)

    async def show() -> None:
        while True:
            await asyncio.sleep(every_s)
            print(f"{over}{what}: {left():,} left", end=end, file=sys.stderr, flush=True)

    async with background([show()], lambda failure: None):
        try:
            yield
        finally:
            print(over, end="", file=sys.stderr, flush=True)
