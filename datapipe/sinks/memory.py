"""A database in memory: for `datapipe.testing`, and for tests of what stands before a database."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from datapipe.events.rows import with_offset
from datapipe.events.types import Column
from datapipe.events.unknown import UNKNOWN, UnknownRow, UnknownType
from datapipe.settings import Settings
from datapipe.sinks import UNKNOWN_GROUPS, Beat, Heartbeat, Mark, Selection, Shelf, Table
from datapipe.sinks.letters import event_json, found, found_unknown
from datapipe.sinks.transaction import Entry, Kept, Known, Letter, RefusedRow, Rows, Transaction
from datapipe.sinks.transactional import TransactionalSink

_T = TypeVar("_T")


@dataclass(slots=True)
class Unknown:
    """A row of the table of unknown events, and why a replay refused it."""

    line: bytes
    message: str | None = None

    @property
    def row(self) -> UnknownRow:
        columns = UnknownType.columns
        return msgspec.json.decode(event_json(UNKNOWN, columns, self.line), type=UnknownRow)


@dataclass(slots=True)
class _Row:
    """Of the ledger."""

    entry: Entry
    lane: str | None
    process: str
    known: Known
    loaded_at: float


class MemoryDatabase:
    """What the sinks of some processes share, as long as it is referred to.

    Attributes:
        lines: the rows of a lane, one by one; not of the unknown events. unknown: these, by id.
        checks: what a lane's rows must fulfil; others are refused.
        ledger: by id; it forgets no idempotency key. letters: by id, with the time of each.
        beats, mirrors: by process. marks: by prefix.
        clock: Unix time, in seconds.
    """

    def __init__(self) -> None:
        self.lines: defaultdict[str, list[bytes]] = defaultdict(list)
        self.checks: dict[str, Callable[[bytes], bool]] = {}
        self.ledger: dict[str, _Row] = {}
        self.letters: dict[int, tuple[Letter, datetime]] = {}
        self.unknown: dict[int, Unknown] = {}
        self.beats: dict[str, Beat] = {}
        self.mirrors: dict[str, str] = {}
        self.marks: dict[str, Mark] = {}
        self.clock: Callable[[], float] = time.time
        self.letter_ids, self.unknown_ids = count(1), count(1)

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[MemorySink]:
        """As `open_sink`."""
        yield MemorySink(self, process)

    def fitting(self, selection: Selection) -> list[tuple[int, Letter, datetime]]:
        """Dead letters, by id."""
        return [
            (id, letter, at)
            for id, (letter, at) in self.letters.items()
            if (selection.ids is None or id in selection.ids)
            and selection.lane in (None, letter.lane)
            and selection.sqlstate in (None, letter.sqlstate or "")
        ]

    def fitting_unknown(self, selection: Selection) -> list[tuple[int, UnknownRow, str | None]]:
        """Unknown events, by id, with the message of each."""
        named = [(id, each.row, each.message) for id, each in self.unknown.items()]
        return [
            (id, row, message)
            for id, row, message in named
            if (selection.ids is None or id in selection.ids)
            and selection.lane in (None, row.event_name)
            and (selection.lanes is None or row.event_name in selection.lanes)
        ]

    def rows(self, lane: str) -> list[bytes]:
        """Those of a lane's table, one by one."""
        if lane == UNKNOWN:
            return [each.line for each in self.unknown.values()]
        return self.lines[lane]

    def keep(self, line: bytes) -> int:
        """Insert a row of the unknown events; its id."""
        id = next(self.unknown_ids)
        self.unknown[id] = Unknown(line)
        return id


class MemoryTransaction:
    """See `Transaction`; `undo` has what is to be done if it does not commit."""

    def __init__(self, database: MemoryDatabase, process: str, undo: ExitStack) -> None:
        self._database = database
        self._process = process
        self._undo = undo

    def enter(
        self,
        kind: str,
        entries: Sequence[Entry],
        lane: str | None = None,
        load: str | None = None,
        not_after: float = math.inf,
    ) -> set[str]:
        ledger, now = self._database.ledger, self._database.clock()
        new = [entry for entry in entries if entry.id not in ledger and now < not_after]
        for entry in new:
            ledger[entry.id] = _Row(entry, lane, self._process, Known(load, 0, 0), now)
            self._undo.callback(ledger.pop, entry.id)
        return {entry.id for entry in new}

    def lock(self, segments: Sequence[str]) -> dict[str, Known]:
        ledger = self._database.ledger
        return {id: ledger[id].known for id in segments if id in ledger}

    def bodies(self, ids: Sequence[str]) -> dict[str, str | None]:
        return {id: self._database.ledger[id].entry.body for id in ids}

    def renew(self, claims: Sequence[str]) -> None:
        """Nothing: no claim is ever forgotten."""

    def book(self, counts: Sequence[tuple[str, int, int]]) -> None:
        for id, dead, duplicates in counts:
            row = self._database.ledger[id]
            row.known = Known(row.known.load, dead, duplicates)

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        lines = self._database.lines[table.name]
        self._undo.callback(lines.__delitem__, slice(len(lines), None))
        check = self._database.checks.get(table.name)
        refused = []
        for each in rows:
            for line in bytes(each.data).splitlines(keepends=True):
                if table.name == UNKNOWN:
                    self._undo.callback(self._database.unknown.pop, self._database.keep(line))
                elif check is None or check(line):
                    lines.append(line)
                else:
                    refused.append(RefusedRow(each.id, line, "23514", "the row fails its check"))
        return refused

    def bury(self, letters: Sequence[Letter]) -> None:
        for letter in letters:
            self._database.letters[next(self._database.letter_ids)] = letter, datetime.now(UTC)

    def kept(self, selection: Selection, after: int, limit: int) -> Sequence[Kept]:
        if selection.shelf is Shelf.UNKNOWN:
            unknown = self._database.fitting_unknown(selection)
            kept = [
                Kept(id, row.event_name, bytes(row.event).decode(), row.received_at)
                for id, row, _ in unknown
            ]
        else:
            fitting = self._database.fitting(selection)
            kept = [Kept(id, letter.lane, letter.event, None) for id, letter, _ in fitting]
        return [each for each in kept if each.id > after][:limit]

    def settle(self, shelf: Shelf, gone: Sequence[int], stay: Sequence[RefusedRow]) -> None:
        if shelf is Shelf.UNKNOWN:
            for id in gone:
                del self._database.unknown[id]
            for each in stay:
                self._database.unknown[int(each.id)].message = each.message
            return
        letters = self._database.letters
        for id in gone:
            del letters[id]
        for each in stay:
            letter, at = letters[int(each.id)]
            state = each.sqlstate or letter.sqlstate
            letters[int(each.id)] = letter._replace(sqlstate=state, message=each.message), at


class MemorySink(TransactionalSink):
    """See `Database`; nothing that it does takes time."""

    def __init__(self, database: MemoryDatabase, process: str) -> None:
        super().__init__("memory")
        self._database = database
        self._process = process

    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        return []

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        with ExitStack() as undo:
            result = work(MemoryTransaction(self._database, self._process, undo))
            undo.pop_all()
        return result

    async def hint(self, table: str) -> str:
        return ""

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        return [("ok", "database: in memory")]

    def ddl(self, tables: Sequence[Table]) -> str:
        return ""

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return self._database.ledger.keys() & set(segments)

    async def expire(self, removed: Sequence[str]) -> None:
        for segment in removed:
            self._database.ledger.pop(segment, None)

    async def expire_source(self, source: str, process: str) -> None:
        ledger = self._database.ledger
        others = [i for i, r in ledger.items() if r.entry.source == source and r.process != process]
        for id in others:
            del ledger[id]
        self._forget_others(source, process)

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        ledger = self._database.ledger
        for id, row in list(ledger.items()):
            if row.entry.source == source and row.loaded_at < before.get(row.lane or "", 0.0):
                del ledger[id]

    async def now(self) -> float:
        return self._database.clock()

    async def find_mark(self, prefix: str) -> Mark | None:
        return self._database.marks.get(prefix)

    async def mark(self, prefix: str) -> Mark:
        return self._database.marks.setdefault(prefix, Mark(uuid4().hex))

    async def confirm_mark(self, prefix: str, id: str) -> None:
        if self._database.marks[prefix].id == id:
            self._database.marks[prefix] = Mark(id, confirmed=True)

    def _forget_others(self, mirror: str, process: str) -> None:
        beats, mirrors = self._database.beats, self._database.mirrors
        for other in [each for each in beats if each != process and mirrors.get(each) == mirror]:
            del beats[other]

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        database = self._database
        last = database.beats.get(beat.process, Beat(0, ended=False))
        database.beats[beat.process] = Beat(last.count + 1, beat.ended, beat.host, beat.group)
        database.mirrors[beat.process] = beat.mirror
        self._forget_others(beat.mirror, beat.process)
        self.works(time.perf_counter())
        return dict(database.beats)

    async def find(self, selection: Selection, limit: int) -> dict[str, Any]:
        if selection.shelf is Shelf.UNKNOWN:
            return self._find_unknown(selection, limit)
        fitting = self._database.fitting(selection)
        messages: defaultdict[tuple[str, str | None], list[str]] = defaultdict(list)
        for _, letter, _ in fitting:
            messages[letter.lane, letter.sqlstate].append(letter.message)
        groups = [(*reason, min(said), len(said)) for reason, said in messages.items()]
        groups.sort(key=lambda group: (-group[3], group[0], group[1] or ""))
        newest = fitting[::-1][:limit]
        return found(groups, [(id, *letter[:5], at) for id, letter, at in newest])

    def _find_unknown(self, selection: Selection, limit: int) -> dict[str, Any]:
        unknown = self._database.fitting_unknown(selection)
        said: defaultdict[str, list[str | None]] = defaultdict(list)
        for _, row, message in unknown:
            said[row.event_name].append(message)
        groups = []
        for name, messages in said.items():
            refused = [message for message in messages if message is not None]
            groups.append((name, len(messages), len(refused), min(refused, default=None)))
        groups.sort(key=lambda group: (-group[1], group[0]))
        newest = [
            (id, row.event_name, bytes(row.event).decode(), message, _time(row.received_at))
            for id, row, message in unknown[::-1][:limit]
        ]
        return found_unknown(len(unknown), groups[:UNKNOWN_GROUPS], newest)

    async def drop(self, selection: Selection) -> int:
        database = self._database
        if selection.shelf is Shelf.UNKNOWN:
            ids = [id for id, _, _ in database.fitting_unknown(selection)]
        else:
            ids = [id for id, _, _ in database.fitting(selection)]
        shelf: dict[int, Any]
        shelf = database.unknown if selection.shelf is Shelf.UNKNOWN else database.letters
        for id in ids:
            del shelf[id]
        return len(ids)

    async def samples(self, names: Sequence[str], each: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in names}
        for unknown in reversed(self._database.unknown.values()):
            row = unknown.row
            if len(found.get(row.event_name, range(each))) < each:
                found[row.event_name].append(bytes(row.event).decode())
        return found

    async def remove_expired(self, table: Table) -> bool:
        if table.name != UNKNOWN or not table.retention_s:
            return False
        unknown, until = self._database.unknown, self._database.clock() - table.retention_s
        old = [id for id, e in unknown.items() if _time(e.row.received_at).timestamp() < until]
        for id in old:
            del unknown[id]
        return False


def _time(text: str) -> datetime:
    """A time of a row, which is in UTC."""
    return datetime.fromisoformat(with_offset(text))
