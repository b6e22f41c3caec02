"""Dead letters in the database: write, look, put back, remove.

The event of a refused row is rebuilt from its columns, and kept as a JSON object. Where `jsonb`
can't hold that (a character that the encoding of the database lacks, a number out of range) it is
kept as a JSON string: the event's JSON in ASCII. `#>> '{}'` gives the text of both.
Source: PostgreSQL documentation, "JSON Types", on escapes in databases that are not UTF8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import aiopg
import msgspec
import psycopg2
import psycopg2.extensions
import psycopg2.extras

from datapipe.errors import EventRejected
from datapipe.events.types import Column
from datapipe.sinks import Check, Selection
from datapipe.sinks.postgres.copy import Copier, Refused, Rows
from datapipe.sinks.postgres.errors import may_be_of_a_row
from datapipe.sinks.transactional import event_json

REPLAY_ROWS = 1000  # in one transaction

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


class _Letter(NamedTuple):
    """What is inserted, in this order."""

    lane: str
    event: str
    sqlstate: str
    message: str
    column_name: str | None
    segment: str

    def in_ascii(self) -> _Letter:
        """The same for any database: the event as a JSON string of its JSON."""
        message = self.message.encode("ascii", "backslashreplace").decode()
        return self._replace(event=json.dumps(_escaped(self.event)), message=message)


def write(
    cursor: psycopg2.extensions.cursor,
    table: str,
    lane: str,
    columns_of: Mapping[str, Sequence[Column]],
    refused: Sequence[Refused],
) -> None:
    """Insert the refused rows as dead letters; `columns_of` is by segment.

    Raises: psycopg2.Error: what is no matter of single letters.
    """
    letters = [
        _Letter(
            lane, event_json(lane, columns_of[each.segment], each.row), each.sqlstate, each.message,
            each.column, each.segment,
        )
        for each in refused
    ]  # fmt: skip
    cursor.execute("SAVEPOINT letters")
    _write(cursor, table, letters)
    cursor.execute("RELEASE SAVEPOINT letters")


def _write(cursor: psycopg2.extensions.cursor, table: str, letters: Sequence[_Letter]) -> None:
    """All at once; of what is refused, each half alone; at last a letter in ASCII."""
    if (error := _insert(cursor, table, letters)) is None:
        return
    if len(letters) > 1:
        half = len(letters) // 2
        _write(cursor, table, letters[:half])
        _write(cursor, table, letters[half:])
    elif _insert(cursor, table, [letters[0].in_ascii()]) is not None:
        raise error


def _insert(
    cursor: psycopg2.extensions.cursor, table: str, letters: Sequence[_Letter]
) -> psycopg2.Error | None:
    """Insert behind the savepoint, and set it anew; the error, if it may be about a letter."""
    try:
        psycopg2.extras.execute_values(
            cursor,
            f"INSERT INTO {table} (lane, event, sqlstate, message, column_name, segment) VALUES %s",
            letters,
            template="(%s, %s::jsonb, %s, %s, %s, %s)",
        )
    except psycopg2.Error as exc:
        if not may_be_of_a_row(exc):
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT letters")
        return exc
    cursor.execute("RELEASE SAVEPOINT letters; SAVEPOINT letters")
    return None


def _escaped(text: str) -> str:
    """JSON in ASCII; what is beyond it can only stand in strings."""
    return _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


class _Received(msgspec.Struct):
    """Of an event: when it came."""

    received_at: str


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
        "SELECT id, lane, event #>> '{}' AS event, sqlstate, message, column_name, created_at"
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
        f"SELECT id, lane, event #>> '{{}}' FROM {table} WHERE {where}"
        " AND id > %s ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED",
        [*values, after, REPLAY_ROWS],
    )
    letters = cursor.fetchall()
    rows: dict[str, list[Rows]] = {}
    refused: list[Refused] = []
    for id, lane, text in letters:
        event = text.encode()
        try:
            row = check(lane, event, msgspec.json.decode(event, type=_Received).received_at)
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
