"""Buffer: the way in. Rows are made durable, booked in their lane, and the loader is woken."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import structlog

from datapipe.errors import BufferFull, MirrorFull
from datapipe.events.segment import SEGMENT_OVERHEAD_BYTES, Chunk
from datapipe.health import Health
from datapipe.mirrors import Appended, Mirror, Recovery
from datapipe.pipeline.group_commit import Done, GroupCommit
from datapipe.pipeline.lane import Lane
from datapipe.pipeline.records import Rate
from datapipe.pipeline.tasks import Failed
from datapipe.pipeline.waiters import Wait, Waiters
from datapipe.settings import Settings

_QUEUES_AT_ONCE = 64  # a POST's appends under way: thousands at once would block the event loop

log = structlog.stdlib.get_logger("datapipe.pipeline.buffer")


class Buffer:
    """All lanes, and a group commit for each queue of the mirror.

    Attributes:
        wake: set when there may be something to load.
        waiters: POSTs that wait for their load.
        health, removal: of appends to the mirror, and of removals from it.
        append_seconds: of the last append.
        removed_bytes: of all rows that left the mirror; removed: how fast they do.
        stopping: the service is stopping: no new request is accepted.
        closed: nothing at all is accepted any more.
    """

    def __init__(
        self,
        mirror: Mirror,
        settings: Settings,
        observe_append: Callable[[float], None],
        failed: Failed,
    ) -> None:
        self.mirror = mirror
        self.lanes: dict[str, Lane] = {}
        self.wake = asyncio.Event()
        self.waiters = Waiters(settings.load_trigger_bytes)
        self.health = Health("append", up=True)
        self.removal = Health("removal")
        self.append_seconds: float | None = None
        self.removed_bytes = 0
        self.removed = Rate()
        self.stopping = self.closed = False
        self._full_since: float | None = None  # `time.perf_counter`
        self._linger_s = settings.mirror_linger_ms / 1000
        self._timeout_s = settings.mirror_timeout + self._linger_s + 1.0
        self._trigger_bytes = settings.load_trigger_bytes
        self._observe_append = observe_append
        self._failed = failed
        self._groups: dict[str, GroupCommit] = {}

    def lane(self, name: str) -> Lane:
        """The lane of this name, made if need be."""
        if name not in self.lanes:
            self.lanes[name] = Lane(name, self.mirror)
        return self.lanes[name]

    async def append(self, chunks: Sequence[Chunk], wait: Wait | None = None) -> None:
        """Make rows durable; once this returns they will be loaded.

        Args: wait: whoever waits for that; to be handed to `waiters.leave` in the end.
        Raises: BufferFull, MirrorUnavailable: nothing is promised; what was already stored in
        another queue of the mirror may still be loaded.
        """
        self.check(chunks)
        if wait is not None:
            self.waiters.enter(wait, chunks, [self.lane(chunk.lane) for chunk in chunks])
        per_lane = self.mirror.traits.queue_per_lane
        by_queue: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            by_queue.setdefault(chunk.lane if per_lane else "", []).append(chunk)
        queues = list(by_queue.items())
        for at in range(0, len(queues), _QUEUES_AT_ONCE):
            some = [self._durable(name, of_one) for name, of_one in queues[at:][:_QUEUES_AT_ONCE]]
            # until each has ended: what is still under way must not be called refused
            for outcome in await asyncio.gather(*some, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    def add(self, chunk: Chunk, done: Done) -> None:
        """The same for a single event, without a coroutine: see `GroupCommit.add`.

        Raises: BufferFull: `done` is not called.
        """
        self.check((chunk,))
        traits = self.mirror.traits
        self._group(chunk.lane if traits.queue_per_lane else "").add((chunk,), done)

    def _durable(self, queue: str, chunks: Sequence[Chunk]) -> asyncio.Future[None]:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: Exception | None) -> None:
            if durable.done():  # nobody waits any more
                return
            if error is None:
                durable.set_result(None)
            else:
                durable.set_exception(error)

        self._group(queue).add(chunks, done)
        return durable

    def check(self, chunks: Sequence[Chunk]) -> None:
        """Raises: BufferFull: `append` and `add` of these would do nothing else."""
        if self.closed:
            raise BufferFull("shutting down")
        if not self.mirror.traits.durable:
            self._check_room(chunks)

    def _check_room(self, chunks: Sequence[Chunk]) -> None:
        state = self.mirror.state()
        coming = sum(len(chunk.data) + SEGMENT_OVERHEAD_BYTES for chunk in chunks)
        if state.bytes + coming > state.max_bytes:
            raise BufferFull("the buffer is full (buffer_max_bytes)")

    def _group(self, queue: str) -> GroupCommit:
        if queue not in self._groups:
            self._groups[queue] = GroupCommit(
                self.mirror, self._book, self.health, self._failed, self._linger_s, self._timeout_s
            )
        return self._groups[queue]

    def _book(self, appended: Appended, began: float) -> None:
        """Count what is stored as accepted, whatever its clients were answered.

        Unless the mirror is shared, nothing of it can have been taken to be loaded before this.
        """
        seconds = time.perf_counter() - began
        if isinstance(appended.error, MirrorFull):
            if self._full_since is None:
                self._full_since = began
            appended.error.retry_after_s = self._until_room_s(seconds=began - self._full_since)
        elif appended.error is None:
            self._works()
        else:
            self._fails(began, appended.error.detail)
        if appended.stored:
            self._full_since = None
            self._observe_append(seconds)
            self.append_seconds = seconds
        sizes: Counter[str] = Counter()
        for segment in appended.stored:
            lane = self.lane(segment.lane)
            lane.accepted += segment.events
            sizes[segment.lane] += len(segment.data)
            if segment.waiter is not None:
                self.waiters.stored(segment, lane)
                self.wake.set()
        for name, size in sizes.items():
            now = self.lanes[name].waiting.bytes
            before = now - size
            # nothing waited before, or now there is enough for a load; else it is due as before
            if before <= 0 or before < self._trigger_bytes <= now:
                self.wake.set()
        if self.mirror.pressed:
            self.wake.set()

    def _fails(self, began: float, error: str) -> None:
        """Where each lane has a queue of its own, one that is in trouble is not the mirror."""
        state = self.mirror.state()
        alone = self.mirror.traits.queue_per_lane and state.up
        if not alone and self.health.fails(began, error):
            log.error("mirror down", mirror=state.kind, error=error)

    def _works(self) -> None:
        if self.health.works(time.perf_counter()):
            log.info("mirror up", mirror=self.mirror.state().kind)

    def recovered(self, found: Recovery) -> None:
        """Count what a recovery found."""
        if found.lanes or not found.more:  # else the mirror was not read: there was no room
            self._works()
        for name, came in found.lanes.items():
            self.lane(name).recovered += came.events
            log.info("recovered", lane=name, **asdict(came))

    @property
    def total_out(self) -> int:
        """Events that have left their lane for good."""
        return sum([lane.total_out for lane in self.lanes.values()])

    @property
    def waiting(self) -> int:
        """Events that wait."""
        return sum([lane.waiting.events for lane in self.lanes.values()])

    @property
    def in_memory(self) -> int:
        """Events held in memory."""
        return sum([lane.waiting.in_memory for lane in self.lanes.values()])

    @property
    def oldest(self) -> float | None:
        """Unix time at which the oldest that waits was sealed, or None; see `Waiting.oldest`."""
        ages = [lane.waiting.oldest for lane in self.lanes.values()]
        return min((age for age in ages if age is not None), default=None)

    def _until_room_s(self, seconds: float) -> float:
        """How long until a twentieth of the mirror is free, at the rate of the last loads; while
        there were none, as long again as it has been full.

        Args: seconds: that it has been full.
        """
        wanted = self.mirror.state().max_bytes / 20
        if (rate := self.removed.per_second()) > 0:
            return min(max(wanted / rate, 1.0), 300.0)
        return min(max(seconds, 1.0), 30.0)

    async def settle(self, timeout_s: float) -> None:
        """Wait for appends and removals that are under way."""
        appends = [task for group in self._groups.values() for task in group.settle()]
        if appends:
            await asyncio.wait(appends, timeout=timeout_s)
        await self.mirror.settle(timeout_s)
