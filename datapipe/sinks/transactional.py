"""What every transactional database does alike, whatever SQL it speaks: load once, and replay.

The ledger makes a load happen once: which segments are new is what an insert into it says, in the
transaction of their rows. A database brings a `Transaction`, and is a `TransactionalSink`.
"""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import count, groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import msgspec
import structlog

from datapipe.errors import EventRejected, LaneBlocked, SinkUnavailable
from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column, with_offset
from datapipe.health import Health, Wait
from datapipe.sinks import Check, Loaded, Selection, SinkState, Table
from datapipe.sinks.guard import Guard
from datapipe.sinks.transaction import (
    Entry,
    Letter,
    RefusedRow,
    Rows,
    TableMissing,
    Transaction,
)

REPLAY_ROWS = 1000  # in one transaction
KEY_REUSED = "idempotency key reused with another body"  # of a dead letter, without an SQLSTATE

_ESCAPED = re.compile(rb"\\([\\tnr])")
_PLAIN = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}

_COLUMNS = attrgetter("columns")
_T = TypeVar("_T")
_ALL = -1  # of some bits
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

    def down(self, error: str) -> None:
        """Note that the database does not answer, or not as it should."""
        if self._health.fails(time.perf_counter(), error):
            log.error("database down", error=error)

    def state(self) -> SinkState:
        """See `Sink.state`."""
        health = self._health
        return SinkState(
            health.up, health.error, self.version, self._schema, self.answer_s, self.product
        )

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
        outcomes = _outcomes(transaction, table.name, fresh)
        duplicates: Counter[str] = Counter()
        reused: list[RefusedRow] = []
        for copy, outcome in outcomes.items():
            id = copy.segment.id
            duplicates[id] += copy.part.events - len(outcome.rows)
            if outcome.reused:
                reused += [RefusedRow(id, row, None, KEY_REUSED) for row in outcome.rows]
        refused: list[RefusedRow] = []
        for columns, group in groupby(fresh, key=_COLUMNS):
            rows = (Rows(each.id, piece) for each in group for piece in _kept(each, outcomes))
            refused += transaction.copy(table, columns, rows)
        copied = sum(each.events for each in fresh) - duplicates.total() - len(reused)
        self._guards[table.name].look(refused, copied, accept_dead)
        if buried := refused + reused:
            transaction.bury([_letter(table.name, once[each.id].columns, each) for each in buried])
            result.refused = tuple(_reason(each) for each in buried[:3])
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
                text = "the segments were held for too long: others may have loaded them since"
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


# --- idempotency keys: which rows of keyed POSTs are new ---
#
# A claim row per (ingest key, idempotency key) says which body stands: the one loaded first. A part
# row per (claim, event name, part) says that this run of rows is in, and its `body` which events it
# lacked because they were rejected. Of a copy that lacks fewer, as the verdict has changed since,
# each such event gets a row of its own. Of another body the same is written, under ids that hold
# its hash: so its events are dead letters once. All are ledger rows, only ever inserted, claims
# before parts before single events, each in key order, or two loads would deadlock.


class _Copy(NamedTuple):
    """A part, in one of the segments that hold it."""

    segment: Segment
    part: Part

    def rows(self, bits: int) -> list[bytes]:
        """The rows of these events (see `Chunk.lacks`)."""
        if not bits:
            return []
        data = self.segment.data[self.part.start : self.part.end]
        lacking = _bits(self.part.lacks)
        events = (n for n in count() if not lacking >> n & 1)
        rows = zip(events, data.split(b"\n")[:-1], strict=False)
        return [row + b"\n" for n, row in rows if bits >> n & 1]


class _Outcome(NamedTuple):
    """What becomes of a part that is not just loaded: those of its rows that are new.

    Attributes: reused: they are dead letters, for another body stands under their key.
    """

    rows: Sequence[bytes]
    reused: bool


def _outcomes(
    transaction: Transaction, lane: str, segments: Sequence[Segment]
) -> dict[_Copy, _Outcome]:
    """Enter claims and parts of new segments; says which parts are not just loaded."""
    copies = [_Copy(segment, part) for segment in segments for part in segment.parts]
    if not copies:
        return {}
    bodies: dict[str, str | None] = {}
    for _, part in copies:
        bodies.setdefault(f"claim:{part.claim}", part.body)
    first = transaction.enter("claim", [Entry(id, body=bodies[id]) for id in sorted(bodies)])
    if known := [id for id in sorted(bodies) if id not in first]:
        # a claim that is missing by now was past `dedupe_window`: nothing stands against it
        standing = transaction.bodies(known)
        # a part that outlived its claim would be taken for one of the next body under the key
        transaction.renew([id for id, body in standing.items() if body == bodies[id]])
        bodies |= standing
    by_id: dict[str, list[_Copy]] = {}
    reused: set[str] = set()
    for copy in copies:
        part = copy.part
        if bodies[f"claim:{part.claim}"] == part.body:
            id = f"part:{part.claim}:{part.name or lane}:{part.number}"
        else:
            id = f"part:{part.claim}:{part.body}:{part.name or lane}:{part.number}"
            reused.add(id)
        by_id.setdefault(id, []).append(copy)
    entries = [Entry(id, body=by_id[id][0].part.lacks or None) for id in sorted(by_id)]
    new = transaction.enter("part", entries, lane)
    if len(new) == len(copies) and not reused:  # most of the time
        return {}
    filled = _fill(transaction, lane, by_id, new)
    outcomes: dict[_Copy, _Outcome] = {}
    for id, of_part in by_id.items():
        for copy in of_part:
            whole = id in new and copy is of_part[0]
            if id in reused or not whole:
                rows = copy.rows(_ALL if whole else filled[copy])
                outcomes[copy] = _Outcome(rows, id in reused)
    return outcomes


def _fill(
    transaction: Transaction, lane: str, by_id: Mapping[str, Sequence[_Copy]], new: Set[str]
) -> Counter[_Copy]:
    """Enter what parts lack and a later copy of them has: the bits of these events, by copy."""
    known = [id for id in by_id if id not in new]
    lacking = transaction.bodies(known) if known else {}
    events: dict[str, tuple[_Copy, int]] = {}
    for id, copies in by_id.items():
        later = copies[1:] if id in new else copies
        lacks = _bits(copies[0].part.lacks if id in new else lacking.get(id))
        for copy in later if lacks else ():
            had = lacks & ~_bits(copy.part.lacks)
            events |= {f"{id}:{n}": (copy, n) for n in range(had.bit_length()) if had >> n & 1}
    filled: Counter[_Copy] = Counter()
    if events:
        for id in transaction.enter("part", [Entry(id) for id in sorted(events)], lane):
            copy, n = events[id]
            filled[copy] |= 1 << n
    return filled


def _bits(lacks: str | None) -> int:
    return int(lacks or "0", 16)


def _kept(segment: Segment, outcomes: Mapping[_Copy, _Outcome]) -> list[bytes | memoryview]:
    """The rows of a segment that go into its table, in runs."""
    if not outcomes:
        return [segment.data]
    copies = [copy for part in segment.parts if (copy := _Copy(segment, part)) in outcomes]
    if not copies:
        return [segment.data]
    view, at = memoryview(segment.data), 0
    kept: list[bytes | memoryview] = []
    for copy in copies:
        kept.append(view[at : copy.part.start])
        outcome = outcomes[copy]
        kept += () if outcome.reused else outcome.rows
        at = copy.part.end
    kept.append(view[at:])
    return [piece for piece in kept if len(piece)]


def _widened(table: Table, segments: Sequence[Segment]) -> Table:
    """The table with the columns that segments of an older event class still bring."""
    names = {column.name for column in table.columns}
    brought = {c.name: c for s in segments for c in s.columns if c.name not in names}
    return replace(table, columns=(*table.columns, *brought.values()))


def found(groups: Iterable[Sequence[Any]], letters: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """What `Shelves.find` returns of dead letters.

    Args:
        groups: lane, SQLSTATE, one of the messages, how many.
        letters: id, lane, the event as text, SQLSTATE, message, column, when it was written.
    """
    names = ("lane", "sqlstate", "message", "count")
    named = [dict(zip(names, group, strict=True)) for group in groups]
    keys = ("id", "lane", "event", "sqlstate", "message", "column_name", "created_at")
    shown = [dict(zip(keys, letter, strict=True)) for letter in letters]
    for letter in shown:
        letter["event"] = msgspec.Raw(letter["event"].encode())
    return {"total": sum(group["count"] for group in named), "groups": named, "letters": shown}


def found_unknown(
    total: int = 0,
    groups: Iterable[Sequence[Any]] = (),
    letters: Iterable[Sequence[Any]] = (),
) -> dict[str, Any]:
    """What `Shelves.find` returns of unknown events.

    Args:
        groups: event_name, how many, how many of them a replay refused, one of its messages.
        letters: id, event_name, the event as text, the message of a replay, when it was received.
    """
    names = ("event_name", "count", "refused", "message")
    keys = ("id", "event_name", "event", "message", "received_at")
    shown = [dict(zip(keys, letter, strict=True)) for letter in letters]
    for letter in shown:
        letter["event"] = msgspec.Raw(letter["event"].encode())
    named = [dict(zip(names, group, strict=True)) for group in groups]
    return {"total": total, "groups": named, "letters": shown}


def _reason(refused: RefusedRow) -> str:
    return f"{refused.sqlstate}: {refused.message}" if refused.sqlstate else refused.message


def _letter(lane: str, columns: Sequence[Column], refused: RefusedRow) -> Letter:
    event = event_json(lane, columns, refused.row)
    return Letter(lane, event, refused.sqlstate, refused.message, refused.column, refused.id)


def event_json(lane: str, columns: Sequence[Column], row: bytes) -> str:
    """The JSON object of a COPY row: as it could be posted again, and `received_at`."""
    event: dict[str, Any] = {"event_name": lane}
    for column, text in zip(columns, row.rstrip(b"\n").split(b"\t"), strict=True):
        event[column.name] = _value(column.type, text)
    return msgspec.json.encode(event).decode()


def _value(type: str, text: bytes) -> Any:
    if text == b"\\N":
        return None
    plain = _ESCAPED.sub(lambda found: _PLAIN[found[1]], text)
    if type in ("bigint", "double precision", "jsonb", "json"):
        return msgspec.Raw(plain)
    if type == "boolean":
        return plain.lower() == b"true"
    return with_offset(plain.decode()) if type == "timestamptz" else plain.decode()
