"""Rows of COPY text become rows of a table; each that the table refuses costs itself only.

They go to `executemany` in pieces, column by column: the text of a piece is cut at every tab and
newline at once, so nothing is done for a single value, unless its type needs it, and nothing for a
single row. When a row is refused, SQLite has undone it alone, the iterator stands behind it, and
`executemany` goes on from there.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import length_hint

from datapipe.errors import LaneBlocked
from datapipe.events.rows import NULL, neutral_time
from datapipe.events.types import Column
from datapipe.sinks.sqlite.connections import Connection
from datapipe.sinks.sqlite.dialect import DIALECT
from datapipe.sinks.sqlite.errors import may_be_of_a_row, one_line, state_of
from datapipe.sinks.transaction import RefusedRow, Rows

PIECE_BYTES = 65_536  # fits into a processor's cache; larger ones are no faster

# After so many bytes, about each ms: `executemany` lets go of the interpreter lock after each row,
# but has it again before the event loop, which waits for it, is awake.
_PAUSE_S = 0.00005

# How a type's text becomes its value, where SQLite can tell.
_VALUES = {"bigint": "CAST(? AS INTEGER)", "boolean": "? = 'True'"}

_NEUTRAL = (19, 26)  # the lengths of a time without an offset

_PLAIN = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}

_unescape = partial(re.compile(r"\\([\\tnr])").sub, lambda found: _PLAIN[found[1]])

_Values = Sequence[str | None]


def copy_rows(
    connection: Connection, table: str, columns: Sequence[Column], rows: Iterable[Rows]
) -> list[RefusedRow]:
    """Copy rows that consist of these columns into a table; those that are refused.

    Raises: sqlite3.Error: what is not about a single row. LaneBlocked.
    """
    types = [column.type for column in columns]
    names = ", ".join(DIALECT.quote(column.name) for column in columns)
    values = ", ".join(_VALUES.get(type, "?") for type in types)
    sql = f"INSERT INTO {DIALECT.table(table)} ({names}) VALUES ({values})"
    connection.executemany(sql, ())  # an error without rows is not about a row
    refused, unpaused = [], 0
    for each in rows:
        for piece in _pieces(bytes(each.data)):
            connection.go_on()
            if (unpaused := unpaused + len(piece)) >= PIECE_BYTES:
                time.sleep(_PAUSE_S)
                unpaused = 0
            for line, error in _insert(connection, sql, _read(types, piece.decode())):
                row, state, said = (
                    piece.split(b"\n")[line] + b"\n",
                    state_of(error),
                    one_line(error),
                )
                named = re.search(rf"\b{re.escape(table)}\.(\w+)", said)
                refused.append(RefusedRow(each.id, row, state, said, named and named[1]))
    return refused


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut behind newlines; of at most `PIECE_BYTES`, but for a single row."""
    at = 0
    while at < len(data):
        end = data.rfind(b"\n", at, at + PIECE_BYTES) + 1 or data.index(b"\n", at) + 1
        yield data[at:end]
        at = end


def _read(types: Sequence[str], text: str) -> list[Sequence[object]]:
    """The values of rows, by column."""
    values = text.replace("\n", "\t").split("\t")
    values.pop()
    columns = [values[i :: len(types)] for i in range(len(types))]
    plain = map(_unescaped, columns) if "\\" in text else columns
    return [
        _READ[type](column) if type in _READ else column
        for type, column in zip(types, plain, strict=True)
    ]


def _insert(
    connection: Connection, sql: str, columns: Sequence[Sequence[object]]
) -> Iterator[tuple[int, sqlite3.Error]]:
    """Insert rows; the index and the error of each that is refused."""
    first = iter(columns[0])
    rows = zip(first, *columns[1:], strict=False)
    while True:
        try:
            connection.executemany(sql, rows)
            return
        except sqlite3.Error as exc:
            if not may_be_of_a_row(exc):
                raise
            if not connection.in_transaction:
                how = "rolls back a whole transaction (ROLLBACK) for one row that it refuses"
            elif connection.execute("SELECT changes()").fetchone()[0]:
                how = "keeps a row that it refuses (FAIL, in a trigger)"
            else:
                yield len(columns[0]) - length_hint(first) - 1, exc
                continue
            raise LaneBlocked(f"the table {how}; let it ABORT: {one_line(exc)}") from exc


def _unescaped(values: Sequence[str]) -> _Values:
    return [
        value if "\\" not in value else None if value == NULL else _unescape(value)
        for value in values
    ]


def _floats(values: _Values) -> list[float | None]:
    """Not by SQLite, whose result may be off by the last bit."""
    return [None if value is None else float(value) for value in values]


def _times(values: _Values) -> _Values:
    """Without an offset, so that they are in order; release 1.0 wrote one."""
    return [
        value if value is None or len(value) in _NEUTRAL else neutral_time(value)
        for value in values
    ]


_READ: dict[str, Callable[[_Values], Sequence[object]]] = {
    "double precision": _floats,
    "timestamptz": _times,
}
