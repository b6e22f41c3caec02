"""Buffer: lanes in memory, mirrored; memory is a cache of the mirror.

Above `buffer_max_bytes` a segment is made durable all the same, but memory forgets its rows: it is
parked. What stays is a position and totals per lane; parked segments are read back oldest first.
The books are counted here and nowhere else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import structlog
import tenacity

from datapipe.errors import BufferFull, MirrorFull, MirrorUnavailable
from datapipe.events.segment import SEGMENT_OVERHEAD_BYTES, SEGMENTS_AT_ONCE, Chunk, Segment
from datapipe.mirrors import Found, Mirror, Neighbours
from datapipe.pipeline.group_commit import Group
from datapipe.pipeline.lane import Lane, Totals
from datapipe.pipeline.rate import Rate
from datapipe.settings import Settings

_REMOVALS_S = 1.0  # how long reading back waits for them, where it has to
_QUEUES_AT_ONCE = 64  # a POST's appends under way: to begin thousands holds up the event loop

log = structlog.stdlib.get_logger("datapipe.pipeline.buffer")


class Buffer:
    """All lanes, and the one way in (`append`) and out (`take`, then `loaded` or `give_back`)."""

    def __init__(
        self, mirror: Mirror, settings: Settings, observe_append: Callable[[float], None]
    ) -> None:
        self.mirror = mirror
        self.lanes: dict[str, Lane] = {}
        self.totals = Totals()
        self.mirror_up = True
        self._worked_at = 0.0
        self.append_seconds: float | None = None  # of the last append
        self.on_change: Callable[[Lane], None] = lambda lane: None
        self._max_bytes = settings.buffer_max_bytes
        self._linger_s = settings.mirror_linger_ms / 1000
        # the mirror gives up by itself; this is for a disk that does not even say no
        self._timeout_s = settings.mirror_timeout + self._linger_s + 1.0
        self._observe_append = observe_append
        self._groups: dict[str, Group] = {}
        self._reading_bytes = 0
        self._removals: set[asyncio.Task[None]] = set()
        self._going: set[str] = set()  # segments that are loaded and not yet removed
        self._removed: list[str] = []  # segments whose ledger rows may go
        self._drained = Rate()
        self.closed = False

    def lane(self, name: str) -> Lane:
        """The lane of this name, made if need be."""
        if name not in self.lanes:
            self.lanes[name] = Lane(name, self.totals)
        return self.lanes[name]

    @property
    def memory_bytes(self) -> int:
        """Segments held in memory, with their overhead."""
        return self.totals.memory

    @property
    def pressed(self) -> bool:
        """Whether half of the memory is in use, or would be if nothing had been parked."""
        return max(self.totals.waiting, self.totals.memory) * 2 >= self._max_bytes

    # --- in ---

    async def append(self, chunks: Sequence[Chunk]) -> None:
        """Make rows durable; once this returns they are the buffer's.

        Raises: BufferFull, MirrorUnavailable: nothing is promised; what was already stored in
        another queue of the mirror may still be loaded.
        """
        if self.closed:
            raise BufferFull("shutting down")
        if not self.mirror.parks:
            self._check_room(chunks)
        if len(chunks) == 1:
            await self._group(self.mirror.queue_of(chunks[0].lane)).add(chunks)
            return
        by_queue: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            by_queue.setdefault(self.mirror.queue_of(chunk.lane), []).append(chunk)
        queues = list(by_queue)
        for at in range(0, len(queues), _QUEUES_AT_ONCE):
            some = queues[at : at + _QUEUES_AT_ONCE]
            waiters = [self._group(queue).add(by_queue[queue]) for queue in some]
            # until each has ended: what is still under way must not be called refused
            outcomes = await asyncio.gather(*waiters, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome

    def full(self, lanes: Iterable[str]) -> set[str]:
        """Those of these lanes that have used up what lanes that can't be loaded may hold.

        Together that is half of the mirror: the other half is for those that can.
        """
        stuck = {name for name in lanes if name in self.lanes and self.lanes[name].stuck}
        if not stuck or self.totals.stuck * 2 < self.mirror.state().max_bytes:
            return set()
        return stuck

    def _check_room(self, chunks: Sequence[Chunk]) -> None:
        coming = sum(len(chunk.data) + SEGMENT_OVERHEAD_BYTES for chunk in chunks)
        if self.memory_bytes + coming > self._max_bytes:
            raise BufferFull("the buffer is full (buffer_max_bytes)")

    def _group(self, queue: str) -> Group:
        if queue not in self._groups:
            self._groups[queue] = Group(
                self.mirror, self._linger_s, self._timeout_s, self._stored, self._append_failed
            )
        return self._groups[queue]

    def _stored(self, segments: Sequence[Segment], seconds: float) -> None:
        self._observe_append(seconds)
        self.append_seconds = seconds
        self._mirror_works(True)
        for segment in segments:
            lane = self.lane(segment.lane)
            lane.accepted += segment.events
            if self._parks(lane, segment):
                lane.park(segment)
            else:
                lane.hold(segment)
                lane.queue.put_nowait(segment)
            self.on_change(lane)

    def _parks(self, lane: Lane, segment: Segment) -> bool:
        if not self.mirror.parks:
            return False
        return (
            bool(lane.runs)  # what lies behind parked segments is read after them
            or lane.stuck
            or self.memory_bytes + segment.bytes > self._max_bytes
        )

    def _append_failed(self, exc: MirrorUnavailable, seconds: float) -> None:
        if isinstance(exc, MirrorFull):
            exc.retry_after_s = self._until_room_s()
        elif time.perf_counter() - seconds > self._worked_at:  # else it heals already
            self._mirror_works(False, exc.detail)

    def _until_room_s(self) -> float:
        """How long until a twentieth of the mirror is free, at the rate of the last loads."""
        wanted = self.mirror.state().max_bytes / 20
        rate = self._drained.per_second()
        return min(max(wanted / rate, 1.0), 300.0) if rate else 30.0

    def _mirror_works(self, up: bool, error: str = "") -> None:
        if up and not self.mirror_up:
            log.info("mirror up", mirror=self.mirror.state().kind)
        elif self.mirror_up and not up:
            log.error("mirror down", mirror=self.mirror.state().kind, error=error)
        self.mirror_up = up
        if up:
            self._worked_at = time.perf_counter()

    async def recover(self, neighbours: Neighbours) -> Found:
        """Take over what the mirror holds and no living process owns.

        Raises: MirrorUnavailable: some of it may come with the next call.
        """
        found = await self.mirror.recover(neighbours)
        if found.segments or not found.more:  # else nothing was asked: there was no room
            self._mirror_works(True)
        for name in found.strangers:
            self.on_change(self.lane(name))
        for segment in found.segments:
            lane = self.lane(segment.lane)
            lane.recovered += segment.events
            lane.hold(segment)
            lane.queue.put_nowait(segment)
        for name in {segment.lane for segment in found.segments}:
            of_lane = [segment for segment in found.segments if segment.lane == name]
            log.info(
                "recovered", lane=name, segments=len(of_lane),
                events=sum(segment.events for segment in of_lane),
                bytes=sum(len(segment.data) for segment in of_lane), source=of_lane[0].source,
            )  # fmt: skip
            self.on_change(self.lane(name))
        for run in found.runs:
            lane = self.lane(run.lane)
            lane.recovered += run.events
            log.info(
                "recovered", lane=run.lane, segments=run.segments, events=run.events,
                bytes=run.bytes, source=run.source,
            )  # fmt: skip
            lane.park_run(run)
            self.on_change(lane)
        return found

    # --- out ---

    async def take(self, lane: Lane, max_bytes: int) -> list[Segment]:
        """The next segments of a lane, `max_bytes` of rows or a single one; they still wait.

        Raises: MirrorUnavailable: parked ones can't be read now.
        """
        taken: list[Segment] = []
        size = 0
        while (segment := self._peek(lane)) is not None:
            if (taken and size + len(segment.data) > max_bytes) or len(taken) == SEGMENTS_AT_ONCE:
                return taken
            self._pop(lane)
            taken.append(segment)
            size += len(segment.data)
        while not taken and lane.runs:
            taken = await self._unpark(lane, max(1, min(max_bytes, self._room())))
        return taken

    async def read_ahead(self, lane: Lane, max_bytes: int) -> None:
        """Have in memory what `take` will want next, so that a load need not wait for reading.

        Not while another `take` of this lane is under way. Raises: MirrorUnavailable.
        """
        if not (self.mirror.reads_ahead and lane.runs):
            return
        if self._peek(lane) is None and self._room() >= max_bytes:
            for segment in await self._unpark(lane, max_bytes):
                lane.queue.put_nowait(segment)

    def _room(self) -> int:
        """Bytes that memory has left, less those that are being read."""
        return self._max_bytes - self.memory_bytes - self._reading_bytes

    @staticmethod
    def _peek(lane: Lane) -> Segment | None:
        """The next segment in memory; the queue's first waits in `returned` until it is taken."""
        if not lane.returned and not lane.queue.empty():
            lane.returned.append(lane.queue.get_nowait())
        return lane.returned[0] if lane.returned else None

    @staticmethod
    def _pop(lane: Lane) -> None:
        lane.returned.popleft()

    async def _unpark(self, lane: Lane, max_bytes: int) -> list[Segment]:
        """Read the next parked segments of a lane, of its oldest run."""
        if self._removals and not self.mirror.reads_ahead:
            await asyncio.wait(self._removals, timeout=_REMOVALS_S)
        run = min(lane.runs.values(), key=lambda run: run.oldest)
        until = run.until  # more may be parked behind it while this reads
        going = self._going.copy()  # its removal may end while this reads it
        self._reading_bytes += max_bytes
        try:
            read = await self.mirror.read(run, max_bytes)
        finally:
            self._reading_bytes -= max_bytes
        run.after = read[-1].position if read else until
        # between two parked ones there may lie one that was not, or that is on its way out
        passed = lane.segments_in_memory.keys() | going
        segments = [segment for segment in read if segment.id not in passed]
        for segment in segments:
            lane.unpark(run, segment)
        if run.after >= run.until:
            lane.end_run(run)
            if run.events:  # the books stay out of balance, as they should: these are nowhere
                log.error("segments missing in the mirror", lane=lane.name, events=run.events)
        return segments

    def give_back(self, lane: Lane, segments: Sequence[Segment]) -> None:
        """A load failed: they wait again, first in their lane."""
        if self.mirror.parks and lane.stuck:
            for segment in segments:
                lane.release(segment)
                lane.park(segment)
        else:
            lane.returned.extendleft(reversed(segments))

    def park_all(self, lane: Lane) -> None:
        """Drop all rows of a lane from memory, but those under way."""
        if not self.mirror.parks:
            return
        while (segment := self._peek(lane)) is not None:
            self._pop(lane)
            lane.release(segment)
            lane.park(segment)

    def loaded(
        self, lane: Lane, segments: Sequence[Segment], loaded: int, duplicate: int, dead: int
    ) -> None:
        """A load has committed: book it, forget the segments, and have the mirror forget them."""
        for segment in segments:
            lane.release(segment)
            self._going.add(segment.id)
        self._drained.add(sum(len(segment.data) for segment in segments))
        lane.loaded += loaded
        lane.duplicate += duplicate
        lane.dead += dead
        task = asyncio.create_task(self._remove(segments))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove(self, segments: Sequence[Segment]) -> None:
        """Until it is done: a failure of the mirror never holds up loading."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(MirrorUnavailable),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=30),
        ):
            with attempt:
                await self.mirror.remove(segments)
        self._going.difference_update(segment.id for segment in segments)
        if self.mirror.forgets_for_good:
            self._removed += [segment.id for segment in segments]

    def removed(self) -> list[str]:
        """Ids of segments that the mirror has forgotten since the last call."""
        removed, self._removed = self._removed, []
        return removed

    async def settle(self, timeout_s: float) -> None:
        """Wait for appends and removals that are under way."""
        waiting = [asyncio.ensure_future(group.settle()) for group in self._groups.values()]
        if pending := [*waiting, *self._removals]:
            await asyncio.wait(pending, timeout=timeout_s)
