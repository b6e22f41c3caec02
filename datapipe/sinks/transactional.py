"""What every transactional database does alike, whatever SQL it speaks: load once, and replay.

The ledger makes a load happen once: which segments are new is what an insert into it says, in the
transaction of their rows. A database brings a `Transaction`, and is a `TransactionalSink`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import msgspec
import structlog

from datapipe.errors import EventRejected, LaneBlocked, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.health import Health, Wait
from datapipe.sinks import Check, Loaded, Selection, SinkState, Table
from datapipe.sinks.guard import Guard
from datapipe.sinks.letters import letter_of, reason_of
from datapipe.sinks.parts import KEY_REUSED, kept, outcomes_of
from datapipe.sinks.transaction import (
    Entry,
    RefusedRow,
    Rows,
    TableMissing,
    Transaction,
)

REPLAY_ROWS = 1000  # in one transaction

_COLUMNS = attrgetter("columns")
_T = TypeVar("_T")
log = structlog.stdlib.get_logger("datapipe.sinks")


class TransactionalSink(ABC):
    """A sink over a database with transactions; all but `load` and `replay` is its own.

    Attributes: product: its name, for people. version: of the server, once it is known. answer_s:
        see `SinkState`.
    """

    product = "the database"

    def __init__(self, schema: str) -> None:
        self.version: str | None = None
        self.answer_s: float | None = None
        self._schema = schema
        self._health = Health()
        self._refuses = False
        # by segment: loads that wrote it and whose COMMIT failed; one may have committed all the
        # same. Not in the segment, which may be parked and read anew before it is tried again
        self._tried: dict[str, set[str]] = {}
        self._guards: defaultdict[str, Guard] = defaultdict(Guard)  # by lane

    @abstractmethod
    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        """See `Sink.prepare`. Args: again: look, even if the table was there before."""

    @abstractmethod
    async def find(self, selection: Selection, limit: int) -> dict[str, Any]:
        """See `Shelves.find`."""

    async def count_dead(self) -> dict[str, int]:
        """See `Shelves.count_dead`."""
        counts: Counter[str] = Counter()
        for group in (await self.find(Selection(), 0))["groups"]:
            counts[group["lane"]] += group["count"]
        return dict(counts)

    @abstractmethod
    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        """Do work in one transaction, in a thread if it takes time, and commit it.

        Raises: SinkUnavailable, LaneBlocked, TableMissing; whatever `work` raises: it is rolled
        back, or unknown.
        """

    async def waits(self) -> dict[str, Wait]:
        """See `Sink.waits`: nothing, where the database doesn't say."""
        return {}

    def abort(self) -> None:  # noqa: B027
        """See `Sink.abort`: nothing, where no load takes long."""

    async def make_ahead(self, table: Table) -> list[str]:
        """See `Upkeep.make_ahead`: nothing, where there are no partitions."""
        return []

    async def remove_expired(self, table: Table) -> bool:
        """See `Upkeep.remove_expired`."""
        return False

    async def adopt(self, table: Table, say: Callable[[str], None]) -> None:
        """See `Upkeep.adopt`."""
        raise LaneBlocked(f"table {table.name}: only PostgreSQL's can be adopted")

    # --- up or down ---

    def works(self, began: float) -> None:
        """Note that real work succeeded, which began then (`time.perf_counter`).

        What began before the last failure says nothing: the server may have ended since. Nor does
        what only read, once it was down: a standby, or a full disk, lets us read.
        """
        if self._health.works(began):
            log.info("database up", product=self.product, version=self.version, schema=self._schema)

    def down(self, error: str, *, refuses: bool = False) -> None:
        """Note that the database does not answer. Args: refuses: it does, and says no."""
        self._refuses = refuses
        if self._health.fails(time.perf_counter(), error):
            log.error("database down", error=error)

    def state(self) -> SinkState:
        """See `Sink.state`."""
        health = self._health
        return SinkState(
            health.up, health.error, self.version, self._schema, self.answer_s, self.product,
            self._refuses and health.up is False,
        )  # fmt: skip

    # --- load ---

    async def load(
        self,
        table: Table,
        segments: Sequence[Segment],
        *,
        accept_dead: bool = False,
        not_after: float | None = None,
    ) -> Loaded:
        """See `Sink.load`.

        Whoever freezes after the ledger has let it in, and before COMMIT, does no harm: until that
        transaction ends, its ledger rows make all others wait who would load the same, so nobody
        has, and none of the copies is removed, which is what pruning goes by. It does end: see
        `Transaction.enter`.
        """
        await self.prepare(table)
        fence = math.inf if not_after is None else not_after
        try:
            loaded = await self._try(table, segments, accept_dead, fence)
        except TableMissing:  # dropped, altered or forbidden since
            await self.prepare(_widened(table, segments), again=True)
            loaded = await self._try(table, segments, accept_dead, fence)
        self._guards[table.name].committed()
        if self._tried:
            for segment in segments:
                self._tried.pop(segment.id, None)
        return loaded

    async def _try(
        self, table: Table, segments: Sequence[Segment], accept_dead: bool, not_after: float
    ) -> Loaded:
        """One transaction. Raises: as `transact`."""
        load = uuid4().hex
        written: list[str] = []
        began = time.perf_counter()
        try:
            loaded = await self.transact(
                table.name,
                partial(self._load, table, segments, accept_dead, not_after, load, written),
            )
        except BaseException:
            for id in written:  # by now: whatever failed before COMMIT left it empty
                self._tried.setdefault(id, set()).add(load)
            raise
        self.works(began)
        return loaded

    def _load(
        self,
        table: Table,
        segments: Sequence[Segment],
        accept_dead: bool,
        not_after: float,
        load: str,
        written: list[str],
        transaction: Transaction,
    ) -> Loaded:
        """All but its COMMIT; last of all, `written` gets the ids of the segments that it wrote."""
        once = {each.id: each for each in segments}
        # in key order, or two loads would wait for each other
        entries = [Entry(id, once[id].events, once[id].source) for id in sorted(once)]
        new = transaction.enter("segment", entries, table.name, load, not_after)
        result = self._known(
            transaction, [each for id, each in once.items() if id not in new], not_after
        )
        fresh = [each for id, each in once.items() if id in new]
        outcomes = outcomes_of(transaction, table.name, fresh)
        duplicates: Counter[str] = Counter()
        reused: list[RefusedRow] = []
        for copy, outcome in outcomes.items():
            id = copy.segment.id
            duplicates[id] += copy.part.events - len(outcome.rows)
            if outcome.reused:
                reused += [RefusedRow(id, row, None, KEY_REUSED) for row in outcome.rows]
        refused: list[RefusedRow] = []
        for columns, group in groupby(fresh, key=_COLUMNS):
            rows = (Rows(each.id, piece) for each in group for piece in kept(each, outcomes))
            refused += transaction.copy(table, columns, rows)
        copied = sum(each.events for each in fresh) - duplicates.total() - len(reused)
        self._guards[table.name].look(refused, copied, accept_dead)
        if buried := refused + reused:
            transaction.bury(
                [letter_of(table.name, once[each.id].columns, each) for each in buried]
            )
            result.refused = tuple(reason_of(each) for each in buried[:3])
        dead = Counter(each.id for each in buried)
        if counts := [(id, dead[id], duplicates[id]) for id in dead.keys() | duplicates.keys()]:
            transaction.book(counts)
        result.dead += len(buried)
        result.dead_of = {**result.dead_of, **dead}
        twice = sum(each.events for each in segments) - sum(each.events for each in once.values())
        result.duplicate += duplicates.total() + twice
        result.loaded += copied - len(refused)
        written += new
        return result

    def _known(
        self, transaction: Transaction, segments: Sequence[Segment], not_after: float
    ) -> Loaded:
        """What is in already. A commit of ours whose answer was lost counts as what it did."""
        result = Loaded()
        if not segments:
            return result
        known = transaction.lock([segment.id for segment in segments])
        if len(known) < len(segments):  # or somebody else removes rows of the ledger
            text = "rows of the ledger have just been removed"
            if not_after < math.inf:
                text = "the batches were held for too long: others may have loaded them since"
            raise SinkUnavailable(text, everywhere=False)
        result.dead_of = {id: each.dead for id, each in known.items() if each.dead}
        for segment in segments:
            load, dead, duplicates = known[segment.id]
            if load in self._tried.get(segment.id, ()):
                result.dead += dead
                result.duplicate += duplicates
                result.loaded += segment.events - dead - duplicates
            else:
                result.duplicate += segment.events
        return result

    async def outcomes(self, segments: Sequence[str]) -> dict[str, int]:
        """See `Ledger.outcomes`: its COMMIT waits for a standby as a load's does."""
        known = await self.transact("outcomes", lambda transaction: transaction.lock(segments))
        return {id: each.dead for id, each in known.items()}

    # --- dead letters, unknown events ---

    async def replay(
        self, selection: Selection, tables: Mapping[str, Table], check: Check
    ) -> tuple[dict[str, int], int]:
        """See `Shelves.replay`."""
        back: Counter[str] = Counter()
        stay = last = 0
        prepared: set[str] = set()
        if not (await self.find(selection, 0))["total"]:  # there may be no table of them
            return {}, 0
        while True:
            work = partial(self._replay, selection, last, tables, check, prepared)
            done = await self.transact("replay", work)
            for lane in done.unprepared:
                await self.prepare(tables[lane])
                prepared.add(lane)
            if done.unprepared:
                continue
            if done.last is None:
                return dict(back), stay
            back.update(done.back)
            stay, last = stay + done.stay, done.last

    def _replay(
        self,
        selection: Selection,
        after: int,
        tables: Mapping[str, Table],
        check: Check,
        prepared: Set[str],
        transaction: Transaction,
    ) -> _Replayed:
        """A thousand of them; none while the table of one is not prepared."""
        kept = transaction.kept(selection, after, REPLAY_ROWS)
        if unprepared := {each.lane for each in kept} & tables.keys() - prepared:
            return _Replayed(unprepared=unprepared)
        rows: dict[str, list[Rows]] = {}
        refused: list[RefusedRow] = []
        for id, lane, text, received_at in kept:
            event = text.encode()
            at = received_at or msgspec.json.decode(event, type=_Received).received_at
            try:
                row = check(lane, event, at)
            except EventRejected as exc:
                refused.append(RefusedRow(str(id), b"", "", exc.detail))
            else:
                rows.setdefault(lane, []).append(Rows(str(id), row))
        for lane, of_lane in rows.items():
            refused += transaction.copy(tables[lane], tables[lane].columns, of_lane)
        stay = {each.id for each in refused}
        gone = [each.id for each in kept if str(each.id) not in stay]
        transaction.settle(selection.shelf, gone, refused)
        back = {name: sum(each.id not in stay for each in group) for name, group in rows.items()}
        return _Replayed(kept[-1].id if kept else None, back, len(stay))


class _Replayed(NamedTuple):
    """What one transaction of a replay did.

    Attributes:
        last: the highest id that it looked at; None: there was none.
        back: rows, by lane. stay: how many were refused.
        unprepared: lanes whose tables must be prepared first; then nothing was done.
    """

    last: int | None = None
    back: Mapping[str, int] = {}
    stay: int = 0
    unprepared: Set[str] = frozenset()


class _Received(msgspec.Struct):
    """When an event was received."""

    received_at: str


def _widened(table: Table, segments: Sequence[Segment]) -> Table:
    """The table with the columns that segments of an older event class still bring."""
    names = {column.name for column in table.columns}
    brought = {c.name: c for s in segments for c in s.columns if c.name not in names}
    return replace(table, columns=(*table.columns, *brought.values()))
