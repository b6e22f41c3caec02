"""LOAD DATA LOCAL of rows that the server may refuse: each refused row costs itself only.

LOCAL implies IGNORE: whatever the SQL mode, the server stores a changed value, or passes over the
row, and warns. So any warning takes a whole piece back to its savepoint. Rows that the server then
names are tried alone, behind all the others; an unnamed one is found by halving. Only what is
refused alone is refused: nothing depends on the names being right.
Source: MariaDB documentation, "LOAD DATA INFILE"; MySQL documentation, "LOAD DATA Statement".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pymysql

from datapipe.errors import EventRejected, LaneBlocked
from datapipe.events.rows import neutral_time
from datapipe.events.types import Column
from datapipe.sinks.dialect import Dialect
from datapipe.sinks.mysql.connections import LoadConnection
from datapipe.sinks.mysql.errors import described, may_be_of_a_row, without_value
from datapipe.sinks.pieces import lines, pieces
from datapipe.sinks.transaction import RefusedRow, Rows

_CHECK_FAILED = 4025  # MariaDB's; its count of rows passes over those that a CHECK refuses
_AT_ROW = re.compile(r"at row ([0-9]{1,9})$")
_NAMES = re.compile(r"[`'](\w+)[`']")
_ROW_NUMBERS = re.compile(r"(?:5\.5\.5-)?(?:1[1-9]|[2-9][0-9]|10\.(?:[7-9]|1[0-9]))\b.*MariaDB")
_OFFSET = re.compile(rb"[+-]\d\d:\d\d(?::\d\d)?\n$")


@dataclass(slots=True)
class _Refusal:
    """Why a piece was refused. Attributes: rows: indexes in it that the server named."""

    sqlstate: str
    message: str
    rows: set[int]


class Copier:
    """Copies rows into one table, in the transaction of a connection, with one list of columns."""

    def __init__(
        self, connection: LoadConnection, dialect: Dialect, table: str, columns: Sequence[Column]
    ) -> None:
        self._connection = connection
        self._columns = columns
        self._numbers = bool(_ROW_NUMBERS.match(connection.server_version))
        self._takes_none = False  # known to take no rows without a word
        self._refused: list[RefusedRow] = []
        targets, sets = [], []
        for i, column in enumerate(columns):
            name = dialect.quote(column.name)
            if column.type == "boolean":
                sets.append(f"{name} = @v{i} IN ('True', 'true', '1')")
                name = f"@v{i}"
            targets.append(name)
        self._statement = (
            f"LOAD DATA LOCAL INFILE 'rows' INTO TABLE {dialect.table(table)} CHARACTER SET utf8mb4"
            r" FIELDS TERMINATED BY '\t' ESCAPED BY '\\' LINES TERMINATED BY '\n'"
            f" ({', '.join(targets)}){' SET ' if sets else ''}{', '.join(sets)}"
        )

    def copy(self, rows: Iterable[Rows]) -> list[RefusedRow]:
        """Copy them all, but those that are refused.

        Raises: pymysql.MySQLError: what is not about a single row.
        """
        self._connection.query("SAVEPOINT piece")
        for piece in pieces(self._neutral(each) for each in rows):
            if refusal := self._try(piece):
                self._sift(lines(piece), refusal)
        self._connection.query("RELEASE SAVEPOINT piece")
        return self._refused

    def _neutral(self, rows: Rows) -> Rows:
        """Release 1.0 wrote an offset to each time, which the server would drop."""
        if self._columns[-1].type != "timestamptz" or not _OFFSET.search(bytes(rows.data[-40:])):
            return rows
        times = [i for i, column in enumerate(self._columns) if column.type == "timestamptz"]
        each = lines([rows])
        return Rows(rows.id, b"".join(_without_offsets(bytes(line.data), times) for line in each))

    # --- pieces, some rows of which are refused ---

    def _try(self, rows: Sequence[Rows]) -> _Refusal | None:
        """Copy behind the savepoint; why not, if it is about a row."""
        error = None
        data = rows[0].data if len(rows) == 1 else b"".join([each.data for each in rows])
        try:
            stored, warnings = self._connection.load(self._statement, data)
        except pymysql.MySQLError as exc:
            if not may_be_of_a_row(exc):
                raise
            error, refusal = exc, _Refusal(exc.sqlstate or "HY000", described(exc)[0], set())
        else:
            if not warnings and stored == bytes(data).count(b"\n"):
                self._connection.query("SAVEPOINT piece")
                return None
            refusal = self._diagnosed()
        self._connection.query("ROLLBACK TO SAVEPOINT piece")
        if not self._takes_none:
            self._take_none(error)
        return refusal

    def _take_none(self, error: pymysql.MySQLError | None) -> None:
        """Copy no rows. Raises: even that is refused, so no row is to blame."""
        _, warnings = self._connection.load(self._statement, b"")
        if warnings:
            raise LaneBlocked(self._diagnosed().message) from error
        self._takes_none = True

    def _diagnosed(self) -> _Refusal:
        """What the server says of the last statement, which warned; or did not, and stored less."""
        said = self._connection.rows("SHOW WARNINGS")
        if not said:
            return _Refusal("HY000", "not stored", set())
        unnumbered = [n for n, (_, _, text) in enumerate(said, 1) if not _AT_ROW.search(text)]
        asked = unnumbered if self._numbers else []
        for n in asked:
            self._connection.query(f"GET DIAGNOSTICS CONDITION {n} @r{n} = ROW_NUMBER")
        worst = next((n for n, (level, *_) in enumerate(said, 1) if level != "Note"), 1)
        self._connection.query(f"GET DIAGNOSTICS CONDITION {worst} @s = RETURNED_SQLSTATE")
        ((state, *numbers),) = self._connection.rows(
            f"SELECT {', '.join(['@s', *(f'@r{n}' for n in asked)])}"
        )
        at = dict(zip(asked, numbers, strict=True))
        named, checked = set(), 0
        for n, (_, code, text) in enumerate(said, 1):
            found = _AT_ROW.search(text)
            if number := int(found[1]) if found else int(at.get(n) or 0):
                named.add(number - 1 + checked)
            checked += code == _CHECK_FAILED
        return _Refusal(state, without_value(" ".join(said[worst - 1][2].split())), named)

    def _sift(self, rows: list[Rows], refusal: _Refusal) -> None:
        """Copy rows of which at least one is refused, and that were refused as a whole."""
        named = sorted(each for each in refusal.rows if each < len(rows))
        if len(rows) == 1:
            self._refuse(rows[0], refusal)
        elif not named:
            self._halve(rows)
        else:
            others = [row for i, row in enumerate(rows) if i not in refusal.rows]
            if others and (again := self._try(others)):
                self._sift(others, _Refusal(again.sqlstate, again.message, set()))
            for i in named:
                if alone := self._try([rows[i]]):
                    self._refuse(rows[i], alone)

    def _halve(self, rows: list[Rows]) -> None:
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if refusal := self._try(half):
                self._sift(half, refusal)

    def _refuse(self, row: Rows, refusal: _Refusal) -> None:
        ours = {column.name for column in self._columns}
        words = _NAMES.findall(refusal.message.replace(".", "`'"))
        column = next((word for word in reversed(words) if word in ours), None)
        self._refused.append(
            RefusedRow(row.id, bytes(row.data), refusal.sqlstate, refusal.message, column)
        )


def _without_offsets(line: bytes, times: Sequence[int]) -> bytes:
    values = line.rstrip(b"\n").split(b"\t")
    for i in times:
        with suppress(EventRejected):  # NULL, or what the server is to refuse
            values[i] = neutral_time(values[i].decode()).encode()
    return b"\t".join(values) + b"\n"
