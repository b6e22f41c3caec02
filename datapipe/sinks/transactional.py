"""What every transactional database does alike, whatever SQL it speaks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from datapipe.events.types import Column

_ESCAPED = re.compile(rb"\\([\\tnr])")
_PLAIN = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


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
    if type in ("bigint", "double precision", "jsonb"):
        return msgspec.Raw(plain)
    if type == "boolean":
        return plain.lower() == b"true"
    return plain.decode()
