"""COPY of rows that the database may refuse: each refused row costs itself only.

Rows go in pieces, each under a savepoint. When one is refused, PostgreSQL usually names its line
in the error's context; other lines there can say "line N" too, so the row is tried alone before it
is called refused. Where no line is named (a foreign key, a trigger) the piece is halved.
psycopg2 sends a whole piece even after the server has refused it, so after the first refusal
pieces are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg2
import psycopg2.extensions

from datapipe.errors import LaneBlocked
from datapipe.sinks.sqlstate import Verdict, copy_line, one_line, verdict

PIECE_BYTES = 2_097_152  # of the first try: what a refusal makes us send again
SMALL_PIECE_ROWS = 512  # after a refusal; doubled with each piece that passes
GUARD_ROWS = 100  # so many refused rows, and more than half of all: the table is taken to be wrong

_FIRST_NUMBER = re.compile(r"\d+")


@dataclass(slots=True, frozen=True)
class Rows:
    """COPY rows of one segment."""

    segment: str
    data: bytes | memoryview


@dataclass(slots=True, frozen=True)
class Refused:
    """One row that the database refuses, and what it said."""

    segment: str
    row: bytes
    sqlstate: str
    message: str
    column: str | None


class _Reader:
    """A file-like object over rows; `copy_expert` asks it for one COPY write after the other."""

    def __init__(self, rows: Sequence[Rows]) -> None:
        self._rows = iter(rows)

    def read(self, size: int) -> bytes:
        gathered: list[bytes | memoryview] = []
        length = 0
        for rows in self._rows:
            gathered.append(rows.data)
            length += len(rows.data)
            if length >= size:
                break
        return b"".join(gathered)


class Copier:
    """Copies rows into one table, in the transaction of `cursor`, with one list of columns."""

    def __init__(
        self, cursor: psycopg2.extensions.cursor, statement: str, table: str, chunk_bytes: int
    ) -> None:
        self._cursor = cursor
        self._statement = statement
        self._table = table
        self._chunk_bytes = chunk_bytes
        self.refused: list[Refused] = []

    def copy(self, rows: Sequence[Rows]) -> None:
        """Copy them all, but those refused, which are gathered in `refused`.

        Raises: psycopg2.Error: what is no matter of single rows.
        """
        for piece in _pieces(rows):
            if self._try(piece) is not None:
                self._copy_lines(_lines(piece))

    def _try(self, rows: Sequence[Rows]) -> psycopg2.Error | None:
        """Copy under a savepoint; the error, if it is about a row."""
        self._cursor.execute("SAVEPOINT piece")
        try:
            self._cursor.copy_expert(self._statement, _Reader(rows), self._chunk_bytes)
        except psycopg2.Error as exc:
            if verdict(exc) is not Verdict.ROW:
                raise
            self._cursor.execute("ROLLBACK TO SAVEPOINT piece")
            return exc
        self._cursor.execute("RELEASE SAVEPOINT piece")
        return None

    def _copy_lines(self, lines: list[Rows]) -> None:
        """Copy rows of which at least one is refused."""
        at, size = 0, SMALL_PIECE_ROWS
        while at < len(lines):
            piece = lines[at : at + size]
            error = self._try(piece)
            if error is None:
                at += len(piece)
                size *= 2
                continue
            size = SMALL_PIECE_ROWS
            at += self._set_aside_first(piece, error)

    def _set_aside_first(self, piece: list[Rows], error: psycopg2.Error) -> int:
        """Find the first refused row; copy those before it. How many rows are dealt with."""
        if len(piece) == 1:
            self._refuse(piece[0], error)
            return 1
        line = self._line(error)
        if line is None or line >= len(piece):
            return self._halve(piece)
        if line and self._try(piece[:line]) is not None:
            return self._halve(piece[:line])
        # only now, behind the rows before it: it may be refused because of one of them
        alone = self._try(piece[line : line + 1])
        if alone is None:  # that number was no line of ours
            return line + 1 + self._halve(piece[line + 1 :])
        self._refuse(piece[line], alone)
        return line + 1

    def _halve(self, piece: list[Rows]) -> int:
        self._copy_halves(piece)
        return len(piece)

    def _copy_halves(self, piece: list[Rows]) -> None:
        """Without a line number to go by: down to the single rows that are refused."""
        error = self._try(piece) if piece else None
        if error is None:
            return
        if len(piece) == 1:
            self._refuse(piece[0], error)
            return
        middle = len(piece) // 2
        self._copy_halves(piece[:middle])
        self._copy_halves(piece[middle:])

    def _line(self, error: psycopg2.Error) -> int | None:
        """The index of the refused row in its piece; the word for "line" is translated."""
        context = copy_line(error)
        if context is None or not context.startswith(f"COPY {self._table}, "):
            return None
        found = _FIRST_NUMBER.search(context, len(f"COPY {self._table}, "))
        return int(found[0]) - 1 if found and int(found[0]) > 0 else None

    def _refuse(self, row: Rows, error: psycopg2.Error) -> None:
        self.refused.append(
            Refused(
                row.segment, bytes(row.data), error.pgcode or "", one_line(error),
                error.diag.column_name or _column_of(error),
            )
        )  # fmt: skip


def guard(refused: Sequence[Refused], rows: int, accept_dead: bool) -> None:
    """Raises: LaneBlocked: so much is refused that the table is taken to be wrong."""
    if accept_dead or len(refused) < GUARD_ROWS or len(refused) * 2 <= rows:
        return
    first = refused[0]
    raise LaneBlocked(
        f"the table refuses {len(refused)} of {rows} rows: {first.message} (SQLSTATE "
        f"{first.sqlstate}); mend the table, or let them through with POST /load?accept=dead"
    )


def _column_of(error: psycopg2.Error) -> str | None:
    """The column that COPY names: "COPY t, line 3, column c: ..."."""
    found = re.search(r", column ([^:]+):", copy_line(error) or "")
    return found[1] if found else None


def _pieces(rows: Sequence[Rows]) -> Iterator[list[Rows]]:
    piece: list[Rows] = []
    size = 0
    for each in rows:
        piece.append(each)
        size += len(each.data)
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _lines(rows: Sequence[Rows]) -> list[Rows]:
    return [
        Rows(each.segment, line + b"\n")
        for each in rows
        for line in bytes(each.data).split(b"\n")[:-1]
    ]
