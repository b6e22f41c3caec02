"""Dead letters and unknown events as people and programs see them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from datapipe.events.rows import with_offset
from datapipe.events.types import Column
from datapipe.sinks.transaction import Letter, RefusedRow

_ESCAPED = re.compile(rb"\\([\\tnr])")
_PLAIN = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def found(groups: Iterable[Sequence[Any]], letters: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """What `Shelves.find` returns of dead letters.

    Args:
        groups: lane, SQLSTATE, one of the messages, how many.
        letters: id, lane, the event as text, SQLSTATE, message, column, when it was written.
    """
    names = ("lane", "sqlstate", "message", "count")
    named = [dict(zip(names, group, strict=True)) for group in groups]
    keys = ("id", "lane", "event", "sqlstate", "message", "column_name", "created_at")
    shown = [dict(zip(keys, letter, strict=True)) for letter in letters]
    for letter in shown:
        letter["event"] = msgspec.Raw(letter["event"].encode())
    return {"total": sum(group["count"] for group in named), "groups": named, "letters": shown}


def found_unknown(
    total: int = 0,
    groups: Iterable[Sequence[Any]] = (),
    letters: Iterable[Sequence[Any]] = (),
) -> dict[str, Any]:
    """What `Shelves.find` returns of unknown events.

    Args:
        groups: event_name, how many, how many of them a replay refused, one of its messages.
        letters: id, event_name, the event as text, the message of a replay, when it was received.
    """
    names = ("event_name", "count", "refused", "message")
    keys = ("id", "event_name", "event", "message", "received_at")
    shown = [dict(zip(keys, letter, strict=True)) for letter in letters]
    for letter in shown:
        letter["event"] = msgspec.Raw(letter["event"].encode())
    named = [dict(zip(names, group, strict=True)) for group in groups]
    return {"total": total, "groups": named, "letters": shown}


def reason_of(refused: RefusedRow) -> str:
    return f"{refused.sqlstate}: {refused.message}" if refused.sqlstate else refused.message


def letter_of(lane: str, columns: Sequence[Column], refused: RefusedRow) -> Letter:
    event = event_json(lane, columns, refused.row)
    return Letter(lane, event, refused.sqlstate, refused.message, refused.column, refused.id)


def event_json(lane: str, columns: Sequence[Column], row: bytes) -> str:
    """The JSON object of a COPY row: as it could be posted again, and `received_at`."""
    event: dict[str, Any] = {"event_name": lane}
    for column, text in zip(columns, row.rstrip(b"\n").split(b"\t"), strict=True):
        event[column.name] = _value(column.type, text)
    return msgspec.json.encode(event).decode()


def _value(type: str, text: bytes) -> Any:
    if text == b"\\N":
        return None
    plain = _ESCAPED.sub(lambda found: _PLAIN[found[1]], text)
    if type in ("bigint", "double precision", "jsonb", "json"):
        return msgspec.Raw(plain)
    if type == "boolean":
        return plain.lower() == b"true"
    return with_offset(plain.decode()) if type == "timestamptz" else plain.decode()
