"""Dead letters in the database: look, put back, remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiopg
import msgspec
import psycopg2.extensions

from datapipe.errors import EventRejected
from datapipe.sinks import Check, Selection
from datapipe.sinks.copying import Copier, Refused, Rows

REPLAY_ROWS = 1000  # in one transaction


async def look(
    cursor: aiopg.Cursor, table: str, selection: Selection, limit: int
) -> dict[str, Any]:
    """`{"total", "groups", "letters"}` as `GET /dead` answers it; the newest letters first."""
    where, values = selection.where()
    await cursor.execute(
        f"SELECT lane, sqlstate, min(message), count(*) FROM {table} WHERE {where}"
        " GROUP BY lane, sqlstate ORDER BY count(*) DESC, lane, sqlstate",
        values,
    )
    groups = [
        {"lane": lane, "sqlstate": sqlstate, "message": message, "count": count}
        for lane, sqlstate, message, count in await cursor.fetchall()
    ]
    names = ("id", "lane", "event", "sqlstate", "message", "column_name", "created_at")
    await cursor.execute(
        f"SELECT id, lane, event::text, sqlstate, message, column_name, created_at FROM {table}"
        f" WHERE {where} ORDER BY id DESC LIMIT %s",
        [*values, limit],
    )
    letters = [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]
    for letter in letters:
        letter["event"] = msgspec.Raw(letter["event"].encode())
    return {"total": sum(group["count"] for group in groups), "groups": groups, "letters": letters}


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
