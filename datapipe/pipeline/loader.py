"""Loader: loads lanes that are due into the sink, and retries what fails.

A few workers share all lanes. A worker waits for a lane that is due, loads one transaction of it,
and looks again: so no lane waits behind a long one.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from datapipe.errors import DatapipeError, LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.events.registry import Registry
from datapipe.events.segment import Segment
from datapipe.health import SLOW_S, Wait
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.lane import Lane
from datapipe.pipeline.records import Load, Records
from datapipe.pipeline.schedule import Schedule, now
from datapipe.pipeline.tasks import Failed, background
from datapipe.retry import backoff
from datapipe.settings import Settings
from datapipe.sinks import Database, Loaded, table_of

_LONGEST_SLEEP_S = 3600.0  # an event loop takes no infinite timer
# The longest wait after failures in a row, seconds. Short for a database or a shared mirror that is
# away: once it is back, loading should go on at once.
_OUTAGE_S = 2.0
_LANE_S = 30.0
_ASK_S = 0.3  # between two looks at the ledger for what other processes have loaded

log = structlog.stdlib.get_logger("datapipe.pipeline.loader")


class Loader:
    """Moves what waits in the buffer into the sink."""

    def __init__(
        self,
        buffer: Buffer,
        sink: Database,
        registry: Registry,
        settings: Settings,
        records: Records,
        observe_load: Callable[[float], None],
    ) -> None:
        self.sink = sink
        self.lanes = buffer.lanes
        self.schedules = {name: Schedule(buffer.lane(name)) for name in registry.lanes}
        self._buffer = buffer
        self._mirror = buffer.mirror
        self._wake = buffer.wake
        self._waiters = buffer.waiters
        self._registry = registry
        self._settings = settings
        self._records = records
        self._observe_load = observe_load
        # what all workers hold must fit into `buffer_max_bytes`
        share = settings.buffer_max_bytes // (settings.load_workers + 1)
        self._take_bytes = max(1, min(settings.load_trigger_bytes, share))

    @asynccontextmanager
    async def running(self, failed: Failed) -> AsyncIterator[None]:
        """Load in the background; a task that dies is reported to `failed`."""
        work = [self._work() for _ in range(self._settings.load_workers)]
        work.append(self._ask_for_slow_ones())
        if self._mirror.traits.shared:
            work.append(self._ask_for_awaited())
        async with background(work, failed):
            try:
                yield
            finally:
                self.sink.abort()

    def reload(self, settings: Settings) -> None:
        """From now on these intervals count, also for what waits already."""
        self._settings = settings
        self._wake.set()

    async def _ask_for_slow_ones(self) -> None:
        """For ever: ask the database what slow loads are waiting for."""
        while True:
            await asyncio.sleep(SLOW_S / 5)
            slow = [lane for lane in self.lanes.values() if lane.health.slow]
            waits: dict[str, Wait] = {}
            with suppress(SinkUnavailable, LaneBlocked):  # the sink has logged it
                waits = await self.sink.waits() if slow else {}
            for lane in slow:
                lane.health.waits_for = waits.get(lane.name) if lane.health.busy else None

    async def _ask_for_awaited(self) -> None:
        """For ever: ask the ledger for what POSTs wait for, as any process may have loaded it.

        So may we, before the mirror had told us that it was stored.
        """
        while True:
            await asyncio.sleep(_ASK_S)
            if ids := self._waiters.segments:
                with suppress(SinkUnavailable, LaneBlocked):  # a load meets it again
                    dead = await self.sink.outcomes(ids)
                    self._waiters.loaded(dead, dead)

    def can_load(self, lane: str) -> bool:
        """Whether this process can load that lane now."""
        return lane in self.schedules and not self.lanes[lane].stuck

    def next_load_seconds(self, lane: str) -> float | None:
        """Seconds until the lane is tried next; None while nothing waits there."""
        schedule = self.schedules.get(lane)
        if schedule is None or not schedule.lane.waiting.events:
            return None
        return max(0.0, schedule.due_at(self._settings) - now())

    # --- on demand ---

    def hurry(self, lanes: Iterable[str]) -> None:
        """Load these without waiting for the interval: something of them was recovered."""
        for name in lanes:
            if name in self._registry.kinds:
                if name not in self.schedules:  # unknown events, while no more are accepted
                    self.schedules[name] = Schedule(self._buffer.lane(name))
                self.schedules[name].hurry()
                continue
            why = f"no event type {name!r} is registered here: add its class (event_modules) or its"
            self._block(self._buffer.lane(name), f"{why} fields (events), and restart")
        self._wake.set()

    async def load_now(
        self, lanes: Iterable[str] | None = None, *, accept_dead: bool = False
    ) -> tuple[dict[str, int], dict[str, str]]:
        """One try for each lane in which something waits; by lane: rows loaded, and errors."""
        wanted = self.lanes.keys() if lanes is None else set(lanes)
        names = [n for n, lane in self.lanes.items() if n in wanted and lane.waiting.events]
        ours = [name for name in names if name in self.schedules]
        tries = {name: self.schedules[name].try_now(accept_dead) for name in ours}
        loaded: dict[str, int] = {}
        failed = {
            name: f"blocked: {self.lanes[name].blocked}" for name in names if name not in tries
        }
        self._wake.set()
        for name, outcome in tries.items():
            rows, error = await outcome
            if rows:
                loaded[name] = rows
            if error is not None:
                failed[name] = error
        return loaded, failed

    async def drain(self) -> None:
        """Load all that waits; ends when nothing is left, or nothing that can be loaded now."""
        await self.load_now([name for name, lane in self.lanes.items() if lane.blocked is None])

    # --- one worker ---

    async def _work(self) -> None:
        """For ever: wait for a lane that is due, and load one transaction of it."""
        while True:
            schedule = await self._next()
            accept_dead = schedule.begin()
            try:
                await self._load(schedule, accept_dead)
            except Exception as exc:  # it ends this worker; who waits for the lane must be answered
                schedule.failed(repr(exc), _LANE_S)
                raise
            finally:
                schedule.end()
                self._wake.set()

    async def _next(self) -> Schedule:
        """Wait for a lane that is due; of several, the one that was served longest ago."""
        while True:
            self._wake.clear()
            if self._mirror.pressed:
                self._hurry_fullest()
            moment, settings = now(), self._settings
            first = min(
                self._able(),
                key=lambda each: (max(moment, each.due_at(settings)), each.served_at),
                default=None,
            )
            due_at = math.inf if first is None else first.due_at(settings)
            if first is not None and due_at <= moment:
                return first
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(due_at, moment + _LONGEST_SLEEP_S)):
                    await self._wake.wait()

    def _hurry_fullest(self) -> None:
        looked = now() - self._mirror.traits.keep_interval_s  # what others had taken may be gone
        able = [
            s for s in self.schedules.values()
            if not s.failures and not s.lane.stuck and s.exhausted_at < looked
        ]  # fmt: skip
        if able:  # the fullest may already be loading: all the better
            max(able, key=lambda s: s.lane.waiting.bytes).hurry()

    def _able(self) -> list[Schedule]:
        """Lanes that a worker may take once they are due; those that fail share one worker."""
        waiting = [s for s in self.schedules.values() if s.lane.waiting.events]
        taken = self._settings.load_workers > 1 and any(s.busy and s.failures for s in waiting)
        return [s for s in waiting if not s.busy and not (taken and s.failures)]

    async def _load(self, schedule: Schedule, accept_dead: bool) -> None:
        """Take a lane's next segments, load them in one transaction, book and remove them."""
        lane = schedule.lane
        segments: list[Segment] = []
        try:
            not_after = await self._not_after()
            segments = await self._take(lane)
            if not segments:
                schedule.exhausted()
                return
            if any(segment.missing for segment in segments):
                segments = await self._without_missing(lane, segments)
            if not segments:
                schedule.succeeded()
                return
            began = time.perf_counter()
            table = table_of(self._registry.kinds[lane.name])
            result = await self.sink.load(
                table, segments, accept_dead=accept_dead, not_after=not_after
            )
        except (MirrorUnavailable, SinkUnavailable, LaneBlocked) as exc:
            self._put_off(schedule, segments, exc)
        except BaseException:
            self._requeue(lane, segments, put_off=False)
            raise
        else:
            self._waiters.loaded([segment.id for segment in segments], result.dead_of)
            self._book(lane, segments, result)
            self._loaded(schedule, result, time.perf_counter() - began, len(segments))

    async def _not_after(self) -> float | None:
        """Until when, by the database's clock, what is taken now may be entered into the ledger.

        Raises: SinkUnavailable, LaneBlocked.
        """
        fence_s = self._mirror.traits.fence_s
        return None if fence_s is None else await self.sink.now() + fence_s

    async def _take(self, lane: Lane) -> list[Segment]:
        """Raises: MirrorUnavailable."""
        shared = self._mirror.traits.shared
        # what a blocked lane's table refuses again need not be fetched and sent back
        probe = shared and lane.blocked is not None
        segments = await self._mirror.take(lane.name, 1 if probe else self._take_bytes)
        if shared:
            lane.taken += sum(segment.events for segment in segments)
        return segments

    def _requeue(self, lane: Lane, segments: Sequence[Segment], *, put_off: bool) -> None:
        if self._mirror.traits.shared:
            lane.returned += sum(segment.events for segment in segments)
        self._mirror.requeue(lane.name, segments, put_off=put_off)

    async def _without_missing(self, lane: Lane, segments: Sequence[Segment]) -> list[Segment]:
        """Book what the mirror no longer has: another process loaded it, or it is lost.

        Returns the others.
        """
        there = [segment for segment in segments if not segment.missing]
        missing = [segment for segment in segments if segment.missing]
        known = await self.sink.outcomes([segment.id for segment in missing])
        theirs = [segment for segment in missing if segment.id in known]
        for segment in theirs:
            segment.missing = False
        self._waiters.loaded(known, known)
        self._book(lane, theirs, Loaded(duplicate=sum(segment.events for segment in theirs)))
        if lost := [segment for segment in missing if segment.id not in known]:
            # the books stay out of balance, as they should: these events are nowhere
            self._book(lane, lost, Loaded())
            events = sum(segment.events for segment in lost)
            log.error("segments missing in the mirror", lane=lane.name, events=events)
        return there

    def _book(self, lane: Lane, segments: Sequence[Segment], result: Loaded) -> None:
        """A load has committed: enter it into the books, remove it from the mirror."""
        lane.loaded += result.loaded
        lane.duplicate += result.duplicate
        lane.dead += result.dead
        self._buffer.removed_bytes += sum(len(segment.data) for segment in segments)
        removal = self._mirror.remove(segments)
        self._buffer.removal.follow(f"the removal of {len(segments)} batches", removal)

    def _loaded(self, schedule: Schedule, result: Loaded, seconds: float, segments: int) -> None:
        """A load has committed: record and log it; its lane is healthy."""
        lane = schedule.lane
        self._observe_load(seconds)
        load = Load(lane.name, result.loaded, result.duplicate, result.dead, round(seconds, 4))
        self._records.loaded(load)
        log.info(
            "segments loaded", lane=lane.name, segments=segments, rows=load.rows,
            duplicates=load.duplicates, dead=load.dead, seconds=load.seconds,
        )  # fmt: skip
        if load.dead:
            log.warning("rows refused", lane=lane.name, rows=load.dead,
                        error="; ".join(dict.fromkeys(result.refused)))  # fmt: skip
        if lane.blocked is not None:
            log.info("lane healed", lane=lane.name)
        lane.blocked, lane.deferred = None, False
        lane.health.works(time.perf_counter())
        schedule.last_load = load
        schedule.failures, schedule.alone = 0, False
        schedule.succeeded(load.rows)
        for other in self.schedules.values():
            other.others_loaded()

    def _put_off(self, schedule: Schedule, segments: Sequence[Segment], exc: DatapipeError) -> None:
        """Retry later; meanwhile the lane must not hold memory that others need.

        An error that is said to be of the whole database and yet hits this lane alone (the disk of
        its table is full) puts off this lane alone. A blocked lane is retried at each interval.
        """
        lane, error = schedule.lane, str(exc)
        if isinstance(exc, LaneBlocked):
            self._block(lane, error)
            error = f"blocked: {error}"
            retry_s = self._settings.load_interval * random.uniform(0.95, 1.05)
        else:
            everywhere = isinstance(exc, SinkUnavailable) and exc.everywhere
            lane.deferred |= schedule.alone or not everywhere
            mirror = isinstance(exc, MirrorUnavailable) and self._mirror.traits.shared
            outage = everywhere or mirror
            retry_s = backoff(schedule.failures + 1, _OUTAGE_S if outage else _LANE_S)
            lane.health.fails(time.perf_counter(), error)
            log.warning("load failed", lane=lane.name, error=error, retry_seconds=round(retry_s, 2))
        self._requeue(lane, segments, put_off=lane.stuck)
        self._records.loaded(Load(lane.name, error=error))
        schedule.failed(error, retry_s)

    def _block(self, lane: Lane, why: str) -> None:
        """A person must act."""
        self._waiters.give_up(lane.name)
        if lane.blocked != why:
            log.error("lane blocked", lane=lane.name, error=why)
        lane.blocked = why
        lane.health.fails(time.perf_counter(), why)
