"""A mirror whose segments are held in memory as well, as far as there is room.

What the journal, IronMQ and `none` have in common: each lane has an `asyncio.Queue` of segments in
memory. Above `buffer_max_bytes` a segment is made durable all the same, but memory forgets its
rows: it is parked. What stays is a position and totals per lane; parked segments are read back
oldest first.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import tenacity

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import SEGMENTS_AT_ONCE, Segment
from datapipe.mirrors import (
    Appended,
    Membership,
    MirrorState,
    Recovered,
    Recovery,
    Traits,
    Waiting,
)

_REMOVALS_S = 1.0  # how long reading back waits for them, where it has to

log = structlog.stdlib.get_logger("datapipe.mirrors")


@dataclass(slots=True)
class Run:
    """Segments of one lane that lie one behind the other in one source of the store.

    Of parked segments this is all that memory holds: where they lie, and their totals.

    Attributes:
        source: which part of the store (a journal file, a queue).
        after, until: positions: all that lie behind `after`, up to and with `until`.
        bytes: of their rows.
        oldest: Unix time at which the first of them was sealed, or earlier.
    """

    lane: str
    source: str
    after: int
    until: int
    segments: int
    events: int
    bytes: int
    oldest: float


@dataclass(slots=True)
class Found:
    """What a store's recovery brought: runs, parked where they lie, and segments in memory."""

    runs: list[Run] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    unregistered: set[str] = field(default_factory=set)
    unconfirmed: set[str] = field(default_factory=set)
    more: bool = False
    left: bool = False


class Store(Protocol):
    """Where a `BufferedMirror` keeps segments.

    Attributes:
        parks: it holds the rows itself, so memory may drop them.
        reads_ahead: what waits can be read while what lies before it is being removed, at no cost.
        forgets_for_good: what was removed can't come back, so its ledger row may go.
    """

    parks: bool
    reads_ahead: bool
    forgets_for_good: bool

    @property
    def traits(self) -> Traits: ...

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Mirror.append`; sets `source` and `position` (rising within a source) of each."""

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """The first segments of a run, oldest first: `max_bytes` of memory, or a single one.

        Fewer than asked for, but none only when the run has ended. Raises: MirrorUnavailable.
        """

    async def remove(self, segments: Sequence[Segment]) -> None:
        """Forget them, durably. Unknown ones are ignored. Raises: MirrorUnavailable."""

    async def recover(self, membership: Membership) -> Found:
        """See `Mirror.recover`; what was found before is not found again."""

    async def keep(self, membership: Membership) -> bool:
        """See `Mirror.keep`."""

    async def release(self) -> None:
        """At a stop: what was recovered and is not loaded can be had by others at once.

        Takes a second or so at the most, and never fails: what stays is theirs after a while.
        """

    def state(self) -> MirrorState: ...


class _Lane:
    """What waits of one lane, and its totals: see `Waiting`.

    A segment waits in `returned` (its load failed), then in `queue`, then parked in a run,
    and is counted in memory while it is being loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: asyncio.Queue[Segment] = asyncio.Queue()
        self.returned: deque[Segment] = deque()
        self.runs: dict[str, Run] = {}  # by source
        self.held: dict[str, Segment] = {}  # by id, taken ones too
        self.ahead: asyncio.Task[None] | None = None
        self.reading = False
        self.put_off = False
        self.in_memory = self.parked = self.bytes = 0
        self._ages: list[tuple[float, str]] = []  # a heap; of segments that are gone, too

    def hold(self, segment: Segment) -> None:
        self.held[segment.id] = segment
        heapq.heappush(self._ages, (segment.created_at, segment.id))

    @property
    def events(self) -> int:
        return self.in_memory + self.parked

    @property
    def oldest(self) -> float | None:
        while self._ages and self._ages[0][1] not in self.held:
            heapq.heappop(self._ages)
        times = [run.oldest for run in self.runs.values()]
        return min([*times, *(age for age, _ in self._ages[:1])], default=None)

    def peek(self) -> Segment | None:
        """The next segment in memory; the queue's first waits in `returned` until it is taken."""
        if not self.returned and not self.queue.empty():
            self.returned.append(self.queue.get_nowait())
        return self.returned[0] if self.returned else None


class BufferedMirror:
    """Implements `Mirror` over a `Store`."""

    def __init__(self, store: Store, buffer_max_bytes: int) -> None:
        self._store = store
        self._max_bytes = buffer_max_bytes
        self._lanes: dict[str, _Lane] = {}
        self._memory_bytes = 0
        self._bytes = 0  # of rows that wait, and of those in lanes that are put off
        self._put_off_bytes = 0
        self._reading_bytes = 0
        self._removals: set[asyncio.Task[None]] = set()
        self._removing: set[str] = set()  # segments that are loaded and not yet removed
        self._removed: list[str] = []  # segments whose ledger rows may go

    @property
    def traits(self) -> Traits:
        return self._store.traits

    @property
    def pressed(self) -> bool:
        """See `Mirror.pressed`."""
        able = self._bytes - self._put_off_bytes
        return max(able, self._memory_bytes) * 2 >= self._max_bytes

    @property
    def memory_bytes(self) -> int:
        """Segments held in memory, with their overhead."""
        return self._memory_bytes

    def state(self) -> MirrorState:
        return self._store.state()

    def waiting(self, lane: str) -> Waiting:
        """See `Mirror.waiting`."""
        return self._lane(lane)

    def full(self, lanes: Iterable[str]) -> set[str]:
        """See `Mirror.full`: lanes that can't be loaded have half of the mirror together.

        The other half is for those that can.
        """
        off = {name for name in lanes if name in self._lanes and self._lanes[name].put_off}
        if not off or self._put_off_bytes * 2 < self._store.state().max_bytes:
            return set()
        return off

    def _lane(self, name: str) -> _Lane:
        if name not in self._lanes:
            self._lanes[name] = _Lane(name)
        return self._lanes[name]

    # --- the totals: every change of what waits goes through these four ---

    def _hold(self, lane: _Lane, segment: Segment) -> None:
        lane.hold(segment)
        lane.in_memory += segment.events
        self._memory_bytes += segment.bytes
        self._count(lane, len(segment.data))

    def _release(self, lane: _Lane, segment: Segment) -> None:
        del lane.held[segment.id]
        lane.in_memory -= segment.events
        self._memory_bytes -= segment.bytes
        self._count(lane, -len(segment.data))

    def _count(self, lane: _Lane, size: int) -> None:
        lane.bytes += size
        self._bytes += size
        if lane.put_off:
            self._put_off_bytes += size

    def _put_off(self, lane: _Lane, put_off: bool) -> None:
        if lane.put_off != put_off:
            lane.put_off = put_off
            self._put_off_bytes += lane.bytes if put_off else -lane.bytes

    # --- in ---

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Mirror.append`."""
        appended = await self._store.append(segments)
        for segment in appended.stored:
            self._keep(self._lane(segment.lane), segment)
        return appended

    def _keep(self, lane: _Lane, segment: Segment) -> None:
        """In memory, if there is room, and nothing is parked behind which it belongs."""
        full = self._memory_bytes + segment.bytes > self._max_bytes
        if self._store.parks and (lane.runs or lane.put_off or full):
            self._park(lane, _run_of(segment))
        else:
            self._hold(lane, segment)
            lane.queue.put_nowait(segment)

    def _park(self, lane: _Lane, run: Run) -> None:
        """Count what memory does not hold, as a part of the run that its source has."""
        lane.parked += run.events
        self._count(lane, run.bytes)
        known = lane.runs.setdefault(run.source, run)
        if known is not run:
            known.after = min(known.after, run.after)
            known.until = max(known.until, run.until)
            known.segments += run.segments
            known.events += run.events
            known.bytes += run.bytes
            known.oldest = min(known.oldest, run.oldest)

    async def recover(self, membership: Membership) -> Recovery:
        """See `Mirror.recover`."""
        found = await self._store.recover(membership)
        done = Recovery({}, found.unregistered, found.unconfirmed, found.more, found.left)
        for segment in found.segments:
            lane = self._lane(segment.lane)
            self._hold(lane, segment)
            lane.queue.put_nowait(segment)
            _add(done, lane.name, segment.source, 1, segment.events, len(segment.data))
        for run in found.runs:
            lane = self._lane(run.lane)
            self._park(lane, run)
            _add(done, lane.name, run.source, run.segments, run.events, run.bytes)
        for name in {*done.lanes, *done.unregistered}:
            if not membership.can_load(name):
                self.requeue(name, (), put_off=True)
        return done

    async def keep(self, membership: Membership) -> bool:
        """See `Mirror.keep`."""
        return await self._store.keep(membership)

    # --- out ---

    async def take(self, lane: str, max_bytes: int) -> list[Segment]:
        """See `Mirror.take`."""
        found = self._lane(lane)
        if found.ahead is not None:  # it reads what comes next
            ahead, found.ahead = found.ahead, None
            await ahead
        taken: list[Segment] = []
        size = 0
        while (segment := found.peek()) is not None and len(taken) < SEGMENTS_AT_ONCE:
            if taken and size + len(segment.data) > max_bytes:
                break
            taken.append(found.returned.popleft())
            size += len(segment.data)
        try:
            while not taken and found.runs:
                taken = await self._unpark(found, max(1, min(max_bytes, self._room())))
        finally:
            self._park_put_off(found)
        if self._may_read_ahead(found, max_bytes):
            found.ahead = asyncio.create_task(self._read_ahead(found, max_bytes))
        return taken

    def _may_read_ahead(self, lane: _Lane, max_bytes: int) -> bool:
        if not self._store.reads_ahead or not lane.runs or lane.put_off:
            return False
        return lane.peek() is None and self._room() >= max_bytes

    async def _read_ahead(self, lane: _Lane, max_bytes: int) -> None:
        """Have in memory what the next `take` will want: so no load waits for reading."""
        with suppress(MirrorUnavailable):  # `take` meets it again
            for segment in await self._unpark(lane, max_bytes):
                lane.queue.put_nowait(segment)
        self._park_put_off(lane)

    def _room(self) -> int:
        """Bytes that memory has left, less those that are being read."""
        return self._max_bytes - self._memory_bytes - self._reading_bytes

    async def _unpark(self, lane: _Lane, max_bytes: int) -> list[Segment]:
        """Read the next parked segments of a lane, of its oldest run."""
        if self._removals and not self._store.reads_ahead:
            await asyncio.wait(self._removals, timeout=_REMOVALS_S)
        run = min(lane.runs.values(), key=lambda run: run.oldest)
        after, until = run.after, run.until  # more may be parked at both ends while this reads
        removing = self._removing.copy()  # its removal may end while this reads it
        self._reading_bytes += max_bytes
        lane.reading = True
        try:
            read = await self._store.read(run, max_bytes)
        finally:
            self._reading_bytes -= max_bytes
            lane.reading = False
        if run.after == after:  # else what was parked before it is read first
            run.after = read[-1].position if read else until
        # between two parked ones there may lie one that was not, or that is on its way out
        passed = lane.held.keys() | removing | self._removing
        segments = [segment for segment in read if segment.id not in passed]
        for segment in segments:
            self._unpark_one(lane, run, segment)
        if run.after >= run.until:
            self._end_run(lane, run)
        return segments

    def _end_run(self, lane: _Lane, run: Run) -> None:
        """All of it was read; of what the store has lost sight of only the bytes are left."""
        del lane.runs[run.source]
        self._count(lane, -run.bytes)
        lane.parked -= run.events
        if run.events:  # the books stay out of balance, as they should: these are nowhere
            log.error("segments missing in the mirror", lane=lane.name, events=run.events)

    def _unpark_one(self, lane: _Lane, run: Run, segment: Segment) -> None:
        run.segments -= 1
        run.events -= segment.events
        run.bytes -= len(segment.data)
        run.oldest = segment.created_at
        lane.parked -= segment.events
        self._count(lane, -len(segment.data))
        self._hold(lane, segment)

    def requeue(self, lane: str, segments: Sequence[Segment], *, put_off: bool) -> None:
        """See `Mirror.requeue`."""
        found = self._lane(lane)
        found.returned.extendleft(reversed(segments))
        self._put_off(found, put_off)
        self._park_put_off(found)

    def _park_put_off(self, lane: _Lane) -> None:
        """A lane that is put off holds no memory.

        Not while a run of it is being read: its position is about to move past what is parked.
        """
        if not lane.put_off or not self._store.parks or lane.reading:
            return
        while lane.peek() is not None:
            segment = lane.returned.popleft()
            self._release(lane, segment)
            self._park(lane, _run_of(segment))

    def remove(self, segments: Sequence[Segment]) -> asyncio.Future[None]:
        """See `Mirror.remove`."""
        for segment in segments:
            lane = self._lane(segment.lane)
            if segment.id in lane.held:
                self._release(lane, segment)
                self._removing.add(segment.id)
            self._put_off(lane, False)
        removal = asyncio.create_task(self._remove(segments))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)
        return removal

    async def _remove(self, segments: Sequence[Segment]) -> None:
        """Until it is done: a failure of the mirror never holds up loading."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(MirrorUnavailable),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=30),
        ):
            with attempt:
                await self._store.remove(segments)
        self._removing.difference_update(segment.id for segment in segments)
        if self._store.forgets_for_good:
            self._removed += [segment.id for segment in segments]

    def expirable(self) -> list[str]:
        """See `Mirror.expirable`."""
        removed, self._removed = self._removed, []
        return removed

    async def settle(self, timeout_s: float) -> None:
        """See `Mirror.settle`."""
        if self._removals:
            await asyncio.wait(self._removals, timeout=timeout_s)
        await self._store.release()


def _run_of(segment: Segment) -> Run:
    return Run(
        segment.lane, segment.source, segment.position - 1, segment.position, 1, segment.events,
        len(segment.data), segment.created_at,
    )  # fmt: skip


def _add(done: Recovery, lane: str, source: str, segments: int, events: int, size: int) -> None:
    sum_of = done.lanes.setdefault(lane, Recovered())
    sum_of.segments += segments
    sum_of.events += events
    sum_of.bytes += size
    sum_of.source = source
