"""COPY of rows that the database may refuse: each refused row costs itself only.

Rows go in pieces, each under a savepoint. When one is refused, PostgreSQL usually names its line
in the error's context; other lines there can say "line N" too, so the row is tried alone before it
is called refused. Where no line is named (a foreign key, a trigger) it is found by halving.
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
        self._cursor.execute("SAVEPOINT piece")
        for piece in _pieces(rows):
            if self._try(piece) is not None:
                self._copy_lines(_lines(piece))
        self._cursor.execute("RELEASE SAVEPOINT piece")

    def _try(self, rows: Sequence[Rows]) -> psycopg2.Error | None:
        """Copy behind the savepoint, and set it anew; the error, if it is about a row."""
        try:
            self._cursor.copy_expert(self._statement, _Reader(rows), self._chunk_bytes)
        except psycopg2.Error as exc:
            if verdict(exc) is not Verdict.ROW:
                raise
            self._cursor.execute("ROLLBACK TO SAVEPOINT piece")
            return exc
        self._cursor.execute("RELEASE SAVEPOINT piece; SAVEPOINT piece")
        return None

    def _copy_lines(self, lines: list[Rows]) -> None:
        """Copy rows of which at least one is refused."""
        at, found, size = 0, 0, SMALL_PIECE_ROWS
        while at < len(lines):
            piece = lines[at : at + size]
            error = self._try(piece)
            if error is None:
                at += len(piece)
                size *= 2
                continue
            line = self._line(error)
            if line is None or line >= len(piece):
                at += self._halve(piece, error)
                found += 1
                # a piece that holds one such row or none, each as likely, takes the fewest tries
                size = max(1, min(SMALL_PIECE_ROWS, at * 2 // (found * 3)))
            else:
                at += self._set_aside(piece, line)
                size = SMALL_PIECE_ROWS

    def _set_aside(self, piece: list[Rows], line: int) -> int:
        """Copy the rows before that line, and refuse it. How many rows are dealt with."""
        if line and (error := self._try(piece[:line])) is not None:
            return self._halve(piece[:line], error)
        # only now, behind the rows before it: it may be refused because of one of them
        error = self._try(piece[line : line + 1])
        if error is not None:  # else that number was no line of ours
            self._refuse(piece[line], error)
        return line + 1

    def _halve(self, piece: list[Rows], error: psycopg2.Error) -> int:
        """Find the first refused row of a piece that was refused; copy those before it.

        How many rows are dealt with: nothing is known of those behind it.
        """
        done, tried = 0, len(piece)
        while len(piece) > 1:
            half = piece[: len(piece) // 2]
            failed = self._try(half)
            if failed is None:
                done += len(half)
                piece = piece[len(half) :]
            else:
                piece, error, tried = half, failed, len(half)
        if tried > 1:  # what was refused held more than this row
            alone = self._try(piece)
            if alone is None:
                return done + 1
            error = alone
        self._refuse(piece[0], error)
        return done + 1

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
