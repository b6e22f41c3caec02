"""Dead letters: the event of a refused row, rebuilt from its columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import psycopg2.extensions
import psycopg2.extras

from datapipe.events import Column
from datapipe.sinks.copying import Refused

_ESCAPED = re.compile(rb"\\([\\tnr])")
_PLAIN = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def write(
    cursor: psycopg2.extensions.cursor,
    table: str,
    lane: str,
    columns_of: Mapping[str, Sequence[Column]],
    refused: Sequence[Refused],
) -> None:
    """Insert the refused rows as dead letters; `columns_of` is by segment."""
    psycopg2.extras.execute_values(
        cursor,
        f"INSERT INTO {table} (lane, event, sqlstate, message, column_name, segment) VALUES %s",
        [
            (
                lane, event_json(lane, columns_of[each.segment], each.row), each.sqlstate,
                each.message, each.column, each.segment,
            )
            for each in refused
        ],
        template="(%s, %s::jsonb, %s, %s, %s, %s)",
    )  # fmt: skip


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
