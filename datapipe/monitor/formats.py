"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from datapipe.mirrors import name_of

NOTHING = "\N{EN DASH}"
REASONS = {  # why events are rejected, for people, in the order in which the page shows them
    "no_content": "empty body",
    "bad_json": "not JSON",
    "key_missing": "a field is missing",
    "bad_value": "wrong value",
    "too_long": "too long",
    "unsupported_event": "unknown event type",
    "unauthorized": "no or wrong ingest key",
    "forbidden": "not with this ingest key",
    "unsupported_encoding": "unknown encoding",
    "key_reused": "idempotency key reused",
    "rate_limited": "over the ingest key's rate",
    "busy": "no room, or stopping",
    "timeout": "not complete in time",
}
_UNITS = ("KiB", "MiB", "GiB", "TiB")


def _rounded(value: float, digits: int) -> float:
    """Half upwards, as people expect: `round` goes to the even one."""
    scale = 10.0**digits
    return math.floor(value * scale + 0.5) / scale


def count(value: float | None) -> str:
    """1204 -> 1,204"""
    return NOTHING if value is None else f"{_rounded(value, 0):,.0f}"


def events(value: int) -> str:
    return f"{count(value)} event{'' if value == 1 else 's'}"


def processes(value: int) -> str:
    return "One process" if value == 1 else f"{count(value)} processes"


def size(value: float | None) -> str:
    """Bytes: 1536 -> 1.5 KiB"""
    if value is None:
        return NOTHING
    if value < 1024:
        return f"{_rounded(value, 0):.0f} B"
    for unit in _UNITS:
        value /= 1024
        if value < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{_rounded(value, 1):.1f} {unit}"


def rate(value: float | None) -> str:
    """Per second: 0.4, 12.3, 1,204"""
    if value is None:
        return NOTHING
    return f"{_rounded(value, 1):.1f}" if 0 < value < 99.95 else count(value)


def seconds(value: float | None) -> str:
    """0.004 -> 4 ms, 3.14 -> 3.1 s, 75 -> 1 min 15 s, 7500 -> 2 h 5 min"""
    if value is None:
        return NOTHING
    if value < 0.9995:
        return f"{_rounded(value * 1000, 0):.0f} ms" if value else "0 s"
    if value < 9.95:
        return f"{_rounded(value, 1):.1f} s"
    whole = int(_rounded(value, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def roughly(value: float) -> str:
    """A guess, to one unit: 3 h"""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{value / unit:.0f} {name}"
    return f"{min(value / 86400, 9999):,.0f} days"


def clock(value: str | None) -> str:
    """An ISO time as the time of day, UTC; with its date unless that is today's."""
    if value is None:
        return NOTHING
    today = value[:10] == datetime.now(UTC).date().isoformat()
    return value[11:19] if today else f"{value[:10]} {value[11:16]}"


def check(value: bool) -> str:
    return "\N{CHECK MARK}" if value else "\N{BALLOT X}"


def outcome(value: str | None) -> str:
    """Of a load, by its error."""
    return "loaded" if value is None else value


def up(value: bool) -> str:
    return "up" if value else "down"


def text(value: Any) -> str:
    return NOTHING if value is None else str(value)


def kind(value: str) -> str:
    """What people call a mirror, by itself."""
    return name_of(value).removeprefix("the ")


def durable(value: str) -> str:
    """A mirror, as the heading of what is said of it."""
    name = kind(value)
    return f"{name[:1].upper()}{name[1:]}{' only' if value == 'none' else ''}"


def alone(value: str) -> str:
    """Where events are that no process holds in memory, by the kind of mirror."""
    return "on disk only" if value == "journal" else f"in {kind(value)} only"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{_rounded(value * 100, 1):.1f} %"


def reason(value: str) -> str:
    """Why events were rejected."""
    return REASONS.get(value, value)


FORMATS: dict[str, Callable[[Any], str]] = {
    "count": count, "size": size, "rate": rate, "seconds": seconds, "clock": clock, "text": text,
    "percent": percent, "check": check, "outcome": outcome, "up": up,
    "durable": durable, "alone": alone, "reason": reason,
    "zero": lambda value: count(value or 0),
}  # fmt: skip
