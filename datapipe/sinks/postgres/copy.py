"""COPY of rows that the database may refuse: each refused row costs itself only.

Rows go in pieces, each under a savepoint. When one is refused, PostgreSQL usually names its line
in the error's context; other lines there can say "line N" too, so the row is tried alone before it
is called refused. Where no line is named (a foreign key, a trigger) it is found by halving. An
error that a COPY of no rows meets, too, is not about a row, whatever its SQLSTATE. Nothing depends
on the words of a message: the server may speak any language.
psycopg2 sends a whole piece even after the server has refused it, so after the first refusal
pieces are small.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain

import psycopg2
import psycopg2.extensions

from datapipe.errors import LaneBlocked
from datapipe.events.types import Column
from datapipe.sinks import Table
from datapipe.sinks.dialect import Dialect
from datapipe.sinks.pieces import lines, pieces
from datapipe.sinks.postgres.errors import is_unrouted, may_be_of_a_row, one_line
from datapipe.sinks.transaction import RefusedRow, Rows

SMALL_PIECE_ROWS = 512  # after a refusal; doubled with each piece that passes

_NUMBER = "[0-9]{1,18}"  # a line's; of more digits Python might refuse to make an int

# What no table could hold, as (SQLSTATE, declared type or None for any): a character that the
# database's encoding lacks; a number in JSON beyond `numeric`; an escape in JSON under SQL_ASCII,
# before PostgreSQL 16.
_OF_ITSELF = {("22P05", None), ("22003", "jsonb"), ("0A000", "jsonb")}

# The columns by which a table is partitioned, also within expressions: they depend on it.
# Source: PostgreSQL, `StorePartitionKey` in heap.c.
_KEY = (
    "SELECT attname::text FROM pg_depend JOIN pg_attribute"
    " ON attrelid = objid AND attnum = objsubid"
    " WHERE classid = 'pg_class'::regclass AND refclassid = classid AND deptype = 'i'"
    " AND objid = refobjid AND refobjsubid = 0 AND objid = (SELECT c.oid FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE nspname = %s AND relname = %s)"
)


_MINUTE = len("2026-11-25 12:00")  # of a time in a row


class PartitionMissing(LaneBlocked):
    """Of a table whose event type has a `partition`: there is none for some rows.

    Attributes: times: Unix times at which those rows and all behind them were received, each to the
        minute below it: so exact may the bounds of partitions be that a person has made.
    """

    def __init__(self, detail: str, table: Table, times: set[float]) -> None:
        super().__init__(detail)
        self.table = table
        self.times = times


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


def attempt(
    cursor: psycopg2.extensions.cursor, work: Callable[[], object]
) -> psycopg2.Error | None:
    """Work behind the savepoint `piece`, and set it anew; the error, if a row may be to blame.

    Raises: psycopg2.Error: what is not about a single row.
    """
    try:
        work()
    except psycopg2.Error as exc:
        if not may_be_of_a_row(exc):
            raise
        cursor.execute("ROLLBACK TO SAVEPOINT piece")
        return exc
    cursor.execute("RELEASE SAVEPOINT piece; SAVEPOINT piece")
    return None


class Copier:
    """Copies rows into one table, in the transaction of `cursor`, with one list of columns."""

    def __init__(
        self,
        cursor: psycopg2.extensions.cursor,
        dialect: Dialect,
        table: Table,
        columns: Sequence[Column],
        chunk_bytes: int,
    ) -> None:
        self._cursor = cursor
        self._table = table
        names = ", ".join(dialect.quote(column.name) for column in columns)
        self._statement = f"COPY {dialect.table(table.name)} ({names}) FROM STDIN"
        self._types = {column.name: column.type for column in columns}
        self._chunk_bytes = chunk_bytes
        # a line of the context that begins with the table's name, in whatever language; most have
        # the word COPY before it. Its first number is the line, a column may follow
        self._place = re.compile(
            rf"^(?:COPY )?{re.escape(table.name)}(?![0-9A-Za-z_])[^0-9\n]*({_NUMBER})([^:\n]*)",
            re.MULTILINE,
        )
        self._takes_none = False  # known to take no rows at all
        self._chosen: dict[tuple[str | None, str | None], bool] = {}
        self._refused: list[RefusedRow] = []

    def copy(self, rows: Iterable[Rows]) -> list[RefusedRow]:
        """Copy them all, but those that are refused.

        Raises: psycopg2.Error: what is not about a single row. PartitionMissing.
        """
        self._cursor.execute("SAVEPOINT piece")
        left = pieces(rows)
        for piece in left:
            try:
                if self._try(piece) is not None:
                    self._copy_lines(lines(piece))
            except psycopg2.Error as exc:
                if not (self._table.partition and is_unrouted(exc)):
                    raise
                detail = f"{one_line(exc)} (SQLSTATE {exc.pgcode})"
                times = _received(chain(piece, chain.from_iterable(left)))
                raise PartitionMissing(detail, self._table, times) from exc
        self._cursor.execute("RELEASE SAVEPOINT piece")
        return self._refused

    def _try(self, rows: Sequence[Rows]) -> psycopg2.Error | None:
        """Copy behind the savepoint; the error, if it is about a row."""
        error = attempt(self._cursor, partial(self._copy, rows))
        if error is not None:
            if is_unrouted(error) and not self._clients_choose(error):
                raise error
            self._take_none()
        return error

    def _copy(self, rows: Sequence[Rows]) -> None:
        self._cursor.copy_expert(self._statement, _Reader(rows), self._chunk_bytes)

    def _take_none(self) -> None:
        """Copy no rows. Raises: psycopg2.Error: even that is refused, so no row is to blame."""
        if not self._takes_none:
            self._copy([])
            self._cursor.execute("ROLLBACK TO SAVEPOINT piece")
            self._takes_none = True

    def _clients_choose(self, error: psycopg2.Error) -> bool:
        """Whether the partition that is missing is one that clients can ask for.

        By the time of receipt, or a column of somebody else's, they can't: then no row is to blame.
        Else anyone could block the lane by a value that no partition is meant for.
        """
        table = (error.diag.schema_name, error.diag.table_name)
        if table not in self._chosen:
            self._cursor.execute(_KEY, table)
            key = {name for (name,) in self._cursor.fetchall()}
            self._chosen[table] = not key or bool(key & self._types.keys() - {"received_at"})
        return self._chosen[table]

    def _copy_lines(self, lines: list[Rows]) -> None:
        """Copy rows of which at least one is refused."""
        at, unnamed, size = 0, 0, SMALL_PIECE_ROWS
        while at < len(lines):
            piece = lines[at : at + size]
            error = self._try(piece)
            if error is None:
                at += len(piece)
                size *= 2
                continue
            line = self._line(error)
            at += self._copy_until_refused(piece, error, line)
            size = SMALL_PIECE_ROWS
            if line is None or line >= len(piece):
                unnamed += 1
                # a piece that holds one such row or none, each as likely, takes the fewest tries
                size = max(1, min(size, at * 2 // (unnamed * 3)))

    def _copy_until_refused(
        self, piece: list[Rows], error: psycopg2.Error, line: int | None
    ) -> int:
        """Find the first refused row of a piece that was refused as a whole; copy those before it.

        The row is tried alone before it is refused, and only behind those before it: one of them
        may be why.

        Args: line: index of the row that the error names, if it does; it may be any number.
        Returns: how many rows are dealt with: nothing is known of those behind them.
        """
        low, high = 0, len(piece)
        named = (-1, -1) if line is None else (line, line + 1)
        same = True  # whether it is those between that were tried and refused
        while high - low > 1:
            middle = next((each for each in named if low < each < high), (low + high) // 2)
            failed = self._try(piece[low:middle])
            if failed is None:
                low, same = middle, False
            else:
                high, error, same = middle, failed, True
        if not same:
            alone = self._try(piece[low:high])
            if alone is None:
                return high
            error = alone
        self._refuse(piece[low], error)
        return high

    def _line(self, error: psycopg2.Error) -> int | None:
        """The index of the refused row in its piece, or what may be it."""
        found = self._place.search(error.diag.context or "")
        return int(found[1]) - 1 if found and int(found[1]) > 0 else None

    def _column(self, error: psycopg2.Error) -> str | None:
        """The column that is to blame, if the error names one, itself or in its context."""
        if name := error.diag.column_name:
            return str(name)
        found = self._place.search(error.diag.context or "")
        words = re.findall(r"\w+", found[2]) if found else []
        return next((word for word in reversed(words) if word in self._types), None)

    def _refuse(self, row: Rows, error: psycopg2.Error) -> None:
        sqlstate, column = error.pgcode or "", self._column(error)
        of_itself = {(sqlstate, None), (sqlstate, self._types.get(column or ""))} & _OF_ITSELF
        self._refused.append(
            RefusedRow(row.id, bytes(row.data), sqlstate, one_line(error), column, bool(of_itself))
        )


def _received(rows: Iterable[Rows]) -> set[float]:
    """When rows were received, which is their last value: Unix times, without seconds."""
    texts = {
        line[line.rfind(b"\t") + 1 :][:_MINUTE]
        for each in rows
        for line in bytes(each.data).split(b"\n")[:-1]
    }
    return {datetime.fromisoformat(text.decode()).replace(tzinfo=UTC).timestamp() for text in texts}
