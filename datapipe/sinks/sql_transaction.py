"""What the transactions of databases that speak SQL do alike; see `sql`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from datapipe.sinks import Selection, Shelf
from datapipe.sinks.dialect import Dialect
from datapipe.sinks.transaction import RENEWED_S, Kept, Known, Letter, RefusedRow

# Values, or ledger rows, in one statement: servers bound the length of it, to as little as 1 MB.
AT_ONCE = 4096

_T = TypeVar("_T")


def sliced(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """In runs of at most `AT_ONCE`."""
    return (values[at : at + AT_ONCE] for at in range(0, len(values), AT_ONCE))


class SqlTransaction(ABC):
    """A `Transaction` but for `enter` and `copy`."""

    def __init__(self, dialect: Dialect, process: str) -> None:
        self._dialect = dialect
        self._process = process
        self._ledger = dialect.parameterized("datapipe_ledger")
        self._letters = dialect.parameterized(Shelf.DEAD_LETTERS.value)
        self._one_of = dialect.one_of.format("text")

    @abstractmethod
    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of one statement. Raises: the driver's errors."""

    @abstractmethod
    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """One statement for each of these, of which it gives no rows; maybe none."""

    def lock(self, segments: Sequence[str]) -> dict[str, Known]:
        """See `Transaction.lock`."""
        rows = self.query(
            f"SELECT segment, {self._dialect.quote('load')}, dead, duplicates FROM {self._ledger}"
            f" WHERE segment {self._one_of} ORDER BY segment{self._dialect.for_update}",
            self._dialect.listed(segments),
        )
        return {id: Known(*rest) for id, *rest in rows}

    def bodies(self, ids: Sequence[str]) -> dict[str, str | None]:
        """See `Transaction.bodies`."""
        sql = f"SELECT segment, body FROM {self._ledger} WHERE segment {self._one_of}"
        found: dict[str, str | None] = {}
        for some in sliced(ids):
            found |= self.query(sql, self._dialect.listed(some))
        return found

    def renew(self, claims: Sequence[str]) -> None:
        """See `Transaction.renew`."""
        d = self._dialect
        old: list[tuple[Any, ...]] = []
        for some in sliced(claims):
            old += self.query(
                f"SELECT segment FROM {self._ledger}"
                f" WHERE segment {self._one_of} AND loaded_at < {d.ago()} ORDER BY segment",
                d.listed(some), RENEWED_S,
            )  # fmt: skip
        self.many(f"UPDATE {self._ledger} SET loaded_at = {d.now} WHERE segment = %s", old)

    def book(self, counts: Sequence[tuple[str, int, int]]) -> None:
        """See `Transaction.book`."""
        self.many(
            f"UPDATE {self._ledger} SET dead = %s, duplicates = %s WHERE segment = %s",
            [(dead, duplicates, id) for id, dead, duplicates in counts],
        )

    def bury(self, letters: Sequence[Letter]) -> None:
        """See `Transaction.bury`."""
        self.many(
            f"INSERT INTO {self._letters}"
            f" (lane, event, {self._dialect.quote('sqlstate')}, message, column_name, segment)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            letters,
        )

    def kept(self, selection: Selection, after: int, limit: int) -> Sequence[Kept]:
        """See `Transaction.kept`."""
        condition, values = self._dialect.where(selection)
        lane, event, received_at = self._dialect.kept(selection.shelf)
        rows = self.query(
            f"SELECT id, {lane}, {event}, {received_at}"
            f" FROM {self._dialect.parameterized(selection.shelf.value)} WHERE {condition}"
            f" AND id > %s ORDER BY id LIMIT %s{self._dialect.skip_locked}",
            *values, after, limit,
        )  # fmt: skip
        return [
            Kept(id, lane, event, None if at is None else str(at)) for id, lane, event, at in rows
        ]

    def settle(self, shelf: Shelf, gone: Sequence[int], stay: Sequence[RefusedRow]) -> None:
        """See `Transaction.settle`."""
        table = self._dialect.parameterized(shelf.value)
        listed = [(self._dialect.listed(gone),)] if gone else []
        self.many(f"DELETE FROM {table} WHERE id {self._dialect.one_of.format('bigint')}", listed)
        if shelf is Shelf.UNKNOWN:
            refused = [(each.message, int(each.id)) for each in stay]
            self.many(f"UPDATE {table} SET message = %s WHERE id = %s", refused)
            return
        state = self._dialect.quote("sqlstate")
        self.many(
            f"UPDATE {self._letters} SET {state} = coalesce(nullif(%s, ''), {state}),"
            " message = %s, column_name = %s WHERE id = %s",
            [(each.sqlstate, each.message, each.column, int(each.id)) for each in stay],
        )
