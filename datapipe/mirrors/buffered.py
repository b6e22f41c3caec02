"""A mirror whose segments are held in memory as well, as far as there is room.

What the journal, IronMQ and `none` have in common: each lane has an `asyncio.Queue` of segments in
memory. Above `buffer_max_bytes` a segment is made durable all the same, but memory drops its rows:
it is parked. What stays is a position and totals per lane; parked segments are read back oldest
first.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress

import structlog

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
from datapipe.mirrors.store import Removal, Run, Store
from datapipe.retry import backoff

_REMOVALS_S = 1.0  # how long reading back waits for them, where it has to
_RETRY_MAX_S = 30.0

log = structlog.stdlib.get_logger("datapipe.mirrors")


class _Lane:
    """What waits of one lane, and its totals: see `Waiting`.

    A segment waits in `returned` (its load failed), then in `queue`, then parked in a run,
    and is counted in memory while it is being loaded. Every change of what waits goes through
    `hold`, `release`, `park`, `unpark` and `end`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: asyncio.Queue[Segment] = asyncio.Queue()
        self.returned: deque[Segment] = deque()
        self.runs: dict[str, Run] = {}  # by source
        self.held: dict[str, Segment] = {}  # by id, taken ones too
        self.ahead: asyncio.Task[None] | None = None
        self.reading = False
        self.in_memory = self.bytes = 0
        self._ages: list[tuple[float, str]] = []  # a heap; of segments that have left, too

    @property
    def parked(self) -> int:
        return sum([run.events for run in self.runs.values()])

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

    def hold(self, segment: Segment) -> None:
        self.held[segment.id] = segment
        heapq.heappush(self._ages, (segment.created_at, segment.id))
        self.in_memory += segment.events
        self.bytes += len(segment.data)

    def release(self, segment: Segment) -> None:
        del self.held[segment.id]
        self.in_memory -= segment.events
        self.bytes -= len(segment.data)

    def park(self, run: Run) -> None:
        """Count what memory does not hold, as a part of the run that its source has."""
        self.bytes += run.bytes
        known = self.runs.setdefault(run.source, run)
        if known is not run:
            known.after = min(known.after, run.after)
            known.until = max(known.until, run.until)
            known.segments += run.segments
            known.events += run.events
            known.bytes += run.bytes
            known.oldest = min(known.oldest, run.oldest)

    def unpark(self, run: Run, segment: Segment) -> None:
        """It was read back; whoever did holds it."""
        run.segments -= 1
        run.events -= segment.events
        run.bytes -= len(segment.data)
        run.oldest = segment.created_at
        self.bytes -= len(segment.data)

    def end(self, run: Run) -> None:
        """All of it was read; of what is missing in the store only the bytes are left."""
        del self.runs[run.source]
        self.bytes -= run.bytes
        if run.events:  # the books stay out of balance, as they should: these are nowhere
            log.error("segments missing in the mirror", lane=self.name, events=run.events)


class BufferedMirror:
    """Implements `Mirror` over a `Store`.

    Attributes: memory_bytes: segments held in memory, with their overhead.
    """

    channel = None  # no other process takes what is ours

    def __init__(self, store: Store, buffer_max_bytes: int) -> None:
        self._store = store
        self._parks = store.traits.durable
        self._max_bytes = buffer_max_bytes
        self._lanes: dict[str, _Lane] = {}
        self._put_off: set[str] = set()  # lanes
        self.memory_bytes = 0
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
        able = sum([lane.bytes for lane in self._lanes.values() if lane.name not in self._put_off])
        return max(able, self.memory_bytes) * 2 >= self._max_bytes

    def state(self) -> MirrorState:
        return self._store.state()

    def waiting(self, lane: str) -> Waiting:
        """See `Mirror.waiting`."""
        return self._lane(lane)

    def full(self, lanes: Iterable[str]) -> dict[str, str]:
        """See `Mirror.full`: lanes that can't be loaded have half of the mirror together.

        The other half is for those that can.
        """
        off = self._put_off.intersection(lanes)
        if not off:
            return {}
        waiting = sum([self._lanes[name].bytes for name in self._put_off])
        if waiting * 2 < self._store.state().max_bytes:
            return {}
        return {name: f"no room for {name}, which can't be loaded now" for name in off}

    def _lane(self, name: str) -> _Lane:
        if name not in self._lanes:
            self._lanes[name] = _Lane(name)
        return self._lanes[name]

    def _hold(self, lane: _Lane, segment: Segment) -> None:
        lane.hold(segment)
        self.memory_bytes += segment.bytes

    def _release(self, lane: _Lane, segment: Segment) -> None:
        lane.release(segment)
        self.memory_bytes -= segment.bytes

    # --- in ---

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Mirror.append`."""
        appended = await self._store.append(segments)
        for segment in appended.stored:
            lane = self._lane(segment.lane)
            full = self.memory_bytes + segment.bytes > self._max_bytes
            # in memory, if there is room, and nothing is parked behind which it belongs
            if self._parks and (lane.runs or lane.name in self._put_off or full):
                lane.park(Run.of(segment))
            else:
                self._enter(lane, segment)
        return appended

    def _enter(self, lane: _Lane, segment: Segment) -> None:
        self._hold(lane, segment)
        lane.queue.put_nowait(segment)

    async def recover(self, membership: Membership) -> Recovery:
        """See `Mirror.recover`."""
        found = await self._store.recover(membership)
        segments, runs = found.segments, found.runs
        found.segments, found.runs = [], []  # whoever keeps the report must not keep rows
        for run in (*map(Run.of, segments), *runs):
            came = found.lanes.setdefault(run.lane, Recovered())
            came.segments += run.segments
            came.events += run.events
            came.bytes += run.bytes
            came.source = run.source
        for segment in segments:
            self._enter(self._lane(segment.lane), segment)
        for run in runs:
            self._lane(run.lane).park(run)
        for name in {*found.lanes, *found.unregistered}:
            if not membership.can_load(name):
                self.requeue(name, (), put_off=True)
        return found

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
                taken = await self._read_back(found, max(1, min(max_bytes, self._room())))
        finally:
            self._park_put_off(found)
        more = found.runs and lane not in self._put_off and found.peek() is None
        if self._store.reads_ahead and more and self._room() >= max_bytes:
            found.ahead = asyncio.create_task(self._read_ahead(found, max_bytes))
        return taken

    async def _read_ahead(self, lane: _Lane, max_bytes: int) -> None:
        """Read what the next `take` will want, so that no load waits for reading."""
        with suppress(MirrorUnavailable):  # `take` meets it again
            for segment in await self._read_back(lane, max_bytes):
                lane.queue.put_nowait(segment)
        self._park_put_off(lane)

    def _room(self) -> int:
        """Bytes that memory has left, less those that are being read."""
        return self._max_bytes - self.memory_bytes - self._reading_bytes

    async def _read_back(self, lane: _Lane, max_bytes: int) -> list[Segment]:
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
        passed = (lane.held, removing, self._removing)
        segments = [each for each in read if not any(each.id in some for some in passed)]
        for segment in segments:
            lane.unpark(run, segment)
            self._hold(lane, segment)
        if run.after >= run.until:
            lane.end(run)
        return segments

    def requeue(self, lane: str, segments: Sequence[Segment], *, put_off: bool) -> None:
        """See `Mirror.requeue`."""
        found = self._lane(lane)
        found.returned.extendleft(reversed(segments))
        (self._put_off.add if put_off else self._put_off.discard)(lane)
        self._park_put_off(found)

    def _park_put_off(self, lane: _Lane) -> None:
        """A lane that is put off holds no memory.

        Not while a run of it is being read: its position is about to move past what is parked.
        """
        if lane.name not in self._put_off or not self._parks or lane.reading:
            return
        while lane.peek() is not None:
            segment = lane.returned.popleft()
            self._release(lane, segment)
            lane.park(Run.of(segment))

    def remove(self, segments: Sequence[Segment]) -> asyncio.Future[None]:
        """See `Mirror.remove`. Their rows are not held until it is done, or memory would fill."""
        removals = []
        for segment in segments:
            lane = self._lane(segment.lane)
            self._put_off.discard(lane.name)
            if segment.id in lane.held:
                self._release(lane, segment)
                self._removing.add(segment.id)
                removals.append(Removal.of(segment))
        task = asyncio.create_task(self._remove(removals))
        self._removals.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _remove(self, removals: Sequence[Removal]) -> None:
        """Until it is done: a failure of the mirror never holds up loading."""
        failures = 0
        while True:
            try:
                await self._store.remove(removals)
                break
            except MirrorUnavailable:
                failures += 1
                await asyncio.sleep(backoff(failures, _RETRY_MAX_S))
        ids = [removal.id for removal in removals]
        self._removing.difference_update(ids)
        if self._store.forgets_for_good:
            self._removed += ids

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What a removal that died leaves in the mirror comes back after a restart, as duplicates:
        its ledger rows stay.
        """
        self._removals.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.critical("background task died", task="removal", exc_info=exc)

    def expirable(self) -> list[str]:
        """See `Mirror.expirable`."""
        removed, self._removed = self._removed, []
        return removed

    async def settle(self, timeout_s: float) -> None:
        """See `Mirror.settle`."""
        if self._removals:
            await asyncio.wait(self._removals, timeout=timeout_s)
        await self._store.release()
