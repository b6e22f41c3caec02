"""Verdict: what an error of a database means; each sink has one table of its own codes for it."""

from __future__ import annotations

import enum

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.sinks.transaction import TableMissing


class Verdict(enum.Enum):
    """What an error of the database means for the load in hand."""

    DOWN = "the whole database: again later"
    LATER = "this event type: again later"
    MISSING = "a table, column or right is missing: one look at the table, then again"
    BLOCKED = "this event type is blocked until a person acts"
    ROW = "one row is refused"


def error_of(
    kind: Verdict, text: str, code: str = "", lane: str | None = None
) -> SinkUnavailable | LaneBlocked:
    """Our error for it, which says what happens next.

    Args: text: one line, without secrets. code: with its name, such as `error 1146`.
    """
    if kind is Verdict.DOWN or lane is None:
        return SinkUnavailable(text)
    if kind is Verdict.LATER:
        return SinkUnavailable(text, everywhere=False)
    blocked = TableMissing if kind is Verdict.MISSING else LaneBlocked
    return blocked(f"{text} ({code})" if code else text)
