"""Dead letters in the database: write, look, put back, remove.

The event of a refused row is rebuilt from its columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiopg
import msgspec
import psycopg2
import psycopg2.extensions
import psycopg2.extras

from datapipe.errors import EventRejected
from datapipe.events import Column
from datapipe.sinks import Check, Selection
from datapipe.sinks.copying import Copier, Refused, Rows
from datapipe.sinks.sqlstate import Verdict, verdict

REPLAY_ROWS = 1000  # in one transaction

_ESCAPED = re.compile(rb"\\([\\tnr])")
_PLAIN = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def write(
    cursor: psycopg2.extensions.cursor,
    table: str,
    lane: str,
    columns_of: Mapping[str, Sequence[Column]],
    refused: Sequence[Refused],
    *,
    json_as_text: bool = False,
) -> None:
    """Insert the refused rows as dead letters; `columns_of` is by segment.

    JSON that `jsonb` itself refuses (a number out of its range) is kept as text.
    """
    values = [
        (
            lane, event_json(lane, columns_of[each.segment], each.row, json_as_text),
            each.sqlstate, each.message, each.column, each.segment,
        )
        for each in refused
    ]  # fmt: skip
    cursor.execute("SAVEPOINT letters")
    try:
        psycopg2.extras.execute_values(
            cursor,
            f"INSERT INTO {table} (lane, event, sqlstate, message, column_name, segment) VALUES %s",
            values,
            template="(%s, %s::jsonb, %s, %s, %s, %s)",
        )
    except psycopg2.Error as exc:
        if json_as_text or verdict(exc) is not Verdict.ROW:
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT letters")
        for each in refused:  # one by one, and then as text
            write(cursor, table, lane, columns_of, [each], json_as_text=len(refused) == 1)
    cursor.execute("RELEASE SAVEPOINT letters")


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


async def look(
    cursor: aiopg.Cursor, table: str, selection: Selection, limit: int
) -> dict[str, Any]:
    """`{"total", "groups", "letters"}` as `GET /dead` answers it; the newest letters first."""
    where, values = selection.where()
    await cursor.execute(
        f"SELECT lane, sqlstate, min(message) AS message, count(*) AS count FROM {table}"
        f" WHERE {where} GROUP BY lane, sqlstate ORDER BY count(*) DESC, lane, sqlstate",
        values,
    )
    groups = await _fetched(cursor)
    await cursor.execute(
        "SELECT id, lane, event::text AS event, sqlstate, message, column_name, created_at"
        f" FROM {table} WHERE {where} ORDER BY id DESC LIMIT %s",
        [*values, limit],
    )
    letters = await _fetched(cursor)
    for letter in letters:
        letter["event"] = msgspec.Raw(letter["event"].encode())
    return {"total": sum(group["count"] for group in groups), "groups": groups, "letters": letters}


async def _fetched(cursor: aiopg.Cursor) -> list[dict[str, Any]]:
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]


async def drop(cursor: aiopg.Cursor, table: str, selection: Selection) -> int:
    """Remove them for good; how many."""
    where, values = selection.where()
    await cursor.execute(f"DELETE FROM {table} WHERE {where}", values)
    return int(cursor.rowcount)


def replay(
    cursor: psycopg2.extensions.cursor,
    table: str,
    selection: Selection,
    after: int,
    check: Check,
    copier_of: Callable[[str], Copier],
) -> tuple[int | None, dict[str, int], int]:
    """Put some of them back, within the transaction of `cursor`: so it can't double.

    Each event is checked again as at the door; what is refused again stays, with the new reason.

    Args:
        after: only those with a larger id; call again with the id that is returned.
        copier_of: what copies into a lane's table.
    Returns: the last id looked at, or None; rows put back by lane; how many stay dead.
    """
    where, values = selection.where()
    cursor.execute(
        f"SELECT id, lane, event::text, event->>'received_at' FROM {table} WHERE {where}"
        " AND id > %s ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED",
        [*values, after, REPLAY_ROWS],
    )
    letters = cursor.fetchall()
    rows: dict[str, list[Rows]] = {}
    refused: list[Refused] = []
    for id, lane, event, received_at in letters:
        try:
            row = check(lane, event.encode(), received_at)
        except EventRejected as exc:
            refused.append(Refused(str(id), b"", "", exc.detail, None))
        else:
            rows.setdefault(lane, []).append(Rows(str(id), row))
    for lane, of_lane in rows.items():
        copier = copier_of(lane)
        copier.copy(of_lane)
        refused += copier.refused
    stay = {int(each.segment): each for each in refused}
    _settle(cursor, table, [letter[0] for letter in letters], stay)
    back = {
        lane: sum(int(row.segment) not in stay for row in of_lane) for lane, of_lane in rows.items()
    }
    return (letters[-1][0] if letters else None), back, len(stay)


def _settle(
    cursor: psycopg2.extensions.cursor, table: str, ids: Sequence[int], stay: Mapping[int, Refused]
) -> None:
    """Remove what is back in its table, and note why the rest is not."""
    cursor.execute(
        f"DELETE FROM {table} WHERE id = ANY(%s)", ([id for id in ids if id not in stay],)
    )
    for id, each in stay.items():
        cursor.execute(
            f"UPDATE {table} SET sqlstate = coalesce(nullif(%s, ''), sqlstate), message = %s,"
            " column_name = %s WHERE id = %s",
            (each.sqlstate, each.message, each.column, id),
        )
