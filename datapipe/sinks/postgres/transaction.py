"""The transaction of a load on a plain psycopg2 connection, and what it knows of dead letters.

The event of a refused row is kept as a JSON object. Where `jsonb` can't hold that (a character that
the encoding of the database lacks, a number out of range) it is kept as a JSON string: the event's
JSON in ASCII. `#>> '{}'` gives the text of both.
Source: PostgreSQL documentation, "JSON Types", on escapes in databases that are not UTF8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import psycopg2.extensions
import psycopg2.extras

from datapipe.events.types import Column
from datapipe.sinks import Selection, Table
from datapipe.sinks.postgres.copy import Copier, attempt
from datapipe.sinks.postgres.ddl import parameterized
from datapipe.sinks.transaction import Entry, Known, Letter, RefusedRow, Rows

_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


class PostgresTransaction:
    """A `Transaction` that `cursor` has begun."""

    def __init__(
        self, cursor: psycopg2.extensions.cursor, schema: str, process: str, chunk_bytes: int
    ) -> None:
        self._cursor = cursor
        self._schema = schema
        self._process = process
        self._chunk_bytes = chunk_bytes
        self._ledger = parameterized(schema, "datapipe_ledger")
        self._letters = parameterized(schema, "datapipe_dead_letters")

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        self._cursor.execute(sql, values)
        rows: list[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    def enter(
        self, kind: str, entries: Sequence[Entry], lane: str | None = None, load: str | None = None
    ) -> set[str]:
        """See `Transaction.enter`. In the order of the collation: both releases write the same."""
        rows = self._query(
            f"INSERT INTO {self._ledger}"
            " (segment, kind, lane, events, source, body, process, load)"
            " SELECT id, %s, %s, events, source, body, %s, %s"
            " FROM unnest(%s::text[], %s::bigint[], %s::text[], %s::text[])"
            " AS new (id, events, source, body) ORDER BY id ON CONFLICT DO NOTHING"
            " RETURNING segment",
            kind, lane, self._process, load, *map(list, zip(*entries, strict=True)),
        )  # fmt: skip
        return {id for (id,) in rows}

    def lock(self, segments: Sequence[str]) -> dict[str, Known]:
        """See `Transaction.lock`.

        Locks are written to the log: a transaction that writes nothing does not wait for the
        synchronous standby at its end, and what it has seen need not be there yet.
        """
        rows = self._query(
            f"SELECT segment, load, dead, duplicates FROM {self._ledger}"
            " WHERE segment = ANY(%s) ORDER BY segment FOR UPDATE",
            list(segments),
        )
        return {id: Known(*rest) for id, *rest in rows}

    def bodies(self, claims: Sequence[str]) -> dict[str, str]:
        """See `Transaction.bodies`."""
        sql = f"SELECT segment, body FROM {self._ledger} WHERE segment = ANY(%s)"
        return dict(self._query(sql, list(claims)))

    def book(self, counts: Sequence[tuple[str, int, int]]) -> None:
        """See `Transaction.book`."""
        self._cursor.execute(
            f"UPDATE {self._ledger} AS ledger SET dead = new.dead, duplicates = new.duplicates"
            " FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS new (id, dead, duplicates)"
            " WHERE ledger.segment = new.id",
            [list(values) for values in zip(*counts, strict=True)],
        )

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Sequence[Rows]
    ) -> list[RefusedRow]:
        """See `Transaction.copy`."""
        copier = Copier(self._cursor, self._schema, table.name, columns, self._chunk_bytes)
        return copier.copy(rows)

    def bury(self, letters: Sequence[Letter]) -> None:
        """See `Transaction.bury`."""
        self._cursor.execute("SAVEPOINT piece")
        self._bury(letters)
        self._cursor.execute("RELEASE SAVEPOINT piece")

    def _bury(self, letters: Sequence[Letter]) -> None:
        """All at once; of what is refused, each half alone; at last a letter in ASCII."""
        if (error := attempt(self._cursor, partial(self._insert, letters))) is None:
            return
        if len(letters) > 1:
            half = len(letters) // 2
            self._bury(letters[:half])
            self._bury(letters[half:])
        elif attempt(self._cursor, partial(self._insert, [_in_ascii(letters[0])])) is not None:
            raise error

    def _insert(self, letters: Sequence[Letter]) -> None:
        psycopg2.extras.execute_values(
            self._cursor,
            f"INSERT INTO {self._letters}"
            " (lane, event, sqlstate, message, column_name, segment) VALUES %s",
            letters,
            template="(%s, %s::jsonb, %s, %s, %s, %s)",
        )

    def letters(
        self, selection: Selection, after: int, limit: int
    ) -> Sequence[tuple[int, str, str]]:
        """See `Transaction.letters`."""
        condition, values = where(selection)
        return self._query(
            f"SELECT id, lane, event #>> '{{}}' FROM {self._letters} WHERE {condition}"
            " AND id > %s ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED",
            *values, after, limit,
        )  # fmt: skip

    def settle(self, back: Sequence[int], stay: Sequence[RefusedRow]) -> None:
        """See `Transaction.settle`."""
        self._cursor.execute(f"DELETE FROM {self._letters} WHERE id = ANY(%s)", (list(back),))
        for each in stay:
            self._cursor.execute(
                f"UPDATE {self._letters} SET sqlstate = coalesce(nullif(%s, ''), sqlstate),"
                " message = %s, column_name = %s WHERE id = %s",
                (each.sqlstate, each.message, each.column, int(each.id)),
            )


def where(selection: Selection) -> tuple[str, list[Any]]:
    """A selection of dead letters as an SQL condition and its values."""
    tests = {"id = ANY(%s)": selection.ids, "lane = %s": selection.lane,
             "sqlstate = %s": selection.sqlstate}  # fmt: skip
    given = {test: value for test, value in tests.items() if value is not None}
    values = [list(value) if isinstance(value, tuple) else value for value in given.values()]
    return " AND ".join(["true", *given]), values


def _in_ascii(letter: Letter) -> Letter:
    """The same for any database: the event as a JSON string of its JSON."""
    message = letter.message.encode("ascii", "backslashreplace").decode()
    # what is beyond ASCII can only stand in strings
    escaped = _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], letter.event)
    return letter._replace(event=json.dumps(escaped), message=message)
