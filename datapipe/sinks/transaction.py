"""Transaction: the few things that a load, and a replay of dead letters, ask of a database."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from datapipe.errors import LaneBlocked
from datapipe.events.types import Column
from datapipe.sinks import Selection, Shelf, Table

# A claim is kept for so much longer than the parts under it: so only an older one need be renewed.
RENEWED_S = 60.0


class TableMissing(LaneBlocked):
    """A table, a column or a right is missing: `prepare`, which makes or names it; once more."""


class Entry(NamedTuple):
    """A row of the ledger: of a segment, or of a claim or a part (see `transactional`).

    Attributes: body: of a claim: the hash of the body that stands; of a part: what it lacks.
    """

    id: str
    events: int = 0
    source: str | None = None
    body: str | None = None


class Known(NamedTuple):
    """What the ledger says of a segment: the load that committed it, and what that did."""

    load: str | None
    dead: int
    duplicates: int


class Rows(NamedTuple):
    """Rows to copy, and the id of the segment, or of the kept event, that they are of."""

    id: str
    data: bytes | memoryview


@dataclass(slots=True, frozen=True)
class RefusedRow:
    """One row that the database refuses, and what it said.

    Attributes:
        sqlstate: None, where it was not the database's decision; empty, where it did not say.
        of_itself: any table of this database would refuse it, so it says nothing about this one.
    """

    id: str
    row: bytes
    sqlstate: str | None
    message: str
    column: str | None = None
    of_itself: bool = False


class Kept(NamedTuple):
    """An event of a shelf, as a replay reads it.

    Attributes:
        lane: that it is to be replayed into.
        event: JSON.
        received_at: None: it stands in the event.
    """

    id: int
    lane: str
    event: str
    received_at: str | None


class Letter(NamedTuple):
    """A dead letter, as it is inserted; `event` is JSON."""

    lane: str
    event: str
    sqlstate: str | None
    message: str
    column_name: str | None
    segment: str


class Transaction(Protocol):
    """One transaction of a database, begun; its verbs block, and raise whatever the driver does."""

    def enter(
        self,
        kind: str,
        entries: Sequence[Entry],
        lane: str | None = None,
        load: str | None = None,
        not_after: float = math.inf,
    ) -> set[str]:
        """Insert ledger rows that are not there yet, in this order; the ids of those inserted.

        Waits for another transaction that has inserted the same id.
        Args:
            kind: segment, claim or part. entries: at least one.
            not_after: see `Sink.load`; judged by the statement that inserts. With it the
                transaction must end even if this process freezes, for others wait for its rows.
        """

    def lock(self, segments: Sequence[str]) -> dict[str, Known]:
        """What the ledger says of these, which stays so until the end.

        Its COMMIT waits for whatever the COMMIT of those rows had to wait for.
        """

    def bodies(self, ids: Sequence[str]) -> dict[str, str | None]:
        """The `body` of ledger rows: of those that are there."""

    def renew(self, claims: Sequence[str]) -> None:
        """From now on the ledger keeps these rows as if they were new; may do nothing for those
        that are younger than `RENEWED_S`.
        """

    def book(self, counts: Sequence[tuple[str, int, int]]) -> None:
        """Note in the ledger how many events of a segment are dead, and how many duplicates."""

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        """Insert rows that consist of these columns; those that the table refuses.

        Args: rows: made while they are read, once.
        """

    def bury(self, letters: Sequence[Letter]) -> None:
        """Insert dead letters."""

    def kept(self, selection: Selection, after: int, limit: int) -> Sequence[Kept]:
        """Events above that id, in order; locks them, and skips locked ones."""

    def settle(self, shelf: Shelf, gone: Sequence[int], stay: Sequence[RefusedRow]) -> None:
        """Remove events, and note why others stay; an empty SQLSTATE changes none."""
