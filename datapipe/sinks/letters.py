"""Dead letters: the event of a refused row, rebuilt from its columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import psycopg2
import psycopg2.extensions
import psycopg2.extras

from datapipe.events import Column
from datapipe.sinks.copying import Refused
from datapipe.sinks.sqlstate import Verdict, verdict

_ESCAPED = re.compile(rb"\\([\\tnr])")
_PLAIN = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def write(
    cursor: psycopg2.extensions.cursor,
    table: str,
    lane: str,
    columns_of: Mapping[str, Sequence[Column]],
    refused: Sequence[Refused],
) -> None:
    """Insert the refused rows as dead letters; `columns_of` is by segment.

    JSON that `jsonb` itself refuses (a number out of its range) is kept as text.
    """

    def insert(letters: Sequence[Refused], *, json_as_text: bool = False) -> None:
        psycopg2.extras.execute_values(
            cursor,
            f"INSERT INTO {table} (lane, event, sqlstate, message, column_name, segment) VALUES %s",
            [
                (
                    lane, event_json(lane, columns_of[each.segment], each.row, json_as_text),
                    each.sqlstate, each.message, each.column, each.segment,
                )
                for each in letters
            ],
            template="(%s, %s::jsonb, %s, %s, %s, %s)",
        )  # fmt: skip

    if _passes(cursor, lambda: insert(refused)):
        return
    for each in refused:
        if not _passes(cursor, lambda each=each: insert([each])):  # type: ignore[misc]
            insert([each], json_as_text=True)


def _passes(cursor: psycopg2.extensions.cursor, insert: Callable[[], None]) -> bool:
    """Insert under a savepoint; false if the values are refused."""
    cursor.execute("SAVEPOINT letters")
    try:
        insert()
    except psycopg2.Error as exc:
        if verdict(exc) is not Verdict.ROW:
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT letters")
        return False
    cursor.execute("RELEASE SAVEPOINT letters")
    return True


def event_json(lane: str, columns: Sequence[Column], row: bytes, json_as_text: bool = False) -> str:
    """The JSON object of a COPY row: as it could be posted again, and `received_at`."""
    event: dict[str, Any] = {"event_name": lane}
    for column, text in zip(columns, row.rstrip(b"\n").split(b"\t"), strict=True):
        as_text = json_as_text and column.type == "jsonb"
        event[column.name] = _value("text" if as_text else column.type, text)
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
