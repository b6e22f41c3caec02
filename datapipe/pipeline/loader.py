"""Loader: when to load which lane; retry, drain.

A few workers share all lanes. A worker picks a lane that is due, loads one transaction of it, and
picks again: so no lane waits behind a long one. A lane's turn ends when all that waited at its
start is loaded; the intervals count from there.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from datapipe.errors import LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.events.registry import Registry
from datapipe.events.segment import Segment
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.lane import Lane
from datapipe.pipeline.records import Load, Records
from datapipe.pipeline.schedule import SLOW_S, Schedule, SlowLoad
from datapipe.pipeline.tasks import background
from datapipe.settings import Settings
from datapipe.sinks import Database, Loaded, table_of

_LONGEST_SLEEP_S = 3600.0  # event loops don't like timers without end

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
        self.schedules: dict[str, Schedule] = {}
        self._records = records
        self._buffer = buffer
        self._mirror = buffer.mirror
        self._wake = buffer.wake
        self._registry = registry
        self._settings = settings
        self._observe_load = observe_load
        for name in registry.types:
            self.schedules[name] = Schedule(buffer.lane(name), _now())

    @property
    def lanes(self) -> Mapping[str, Lane]:
        return self._buffer.lanes

    def can_load(self, lane: str) -> bool:
        """Whether this process can load that lane now."""
        return lane in self.schedules and not self.schedules[lane].lane.stuck

    def hurry(self, lanes: Iterable[str]) -> None:
        """Load these without waiting for the interval: they were recovered."""
        for name in lanes:
            if name in self.schedules:
                self.schedules[name].hurry()
            else:
                self._block_unregistered(self._buffer.lane(name))
        self._wake.set()

    def _block_unregistered(self, lane: Lane) -> None:
        if lane.blocked is None:
            lane.blocked = (
                f"no event type {lane.name!r} is registered here; its events are kept: add its "
                "class (event_modules) or its fields (events)"
            )
            log.error("lane blocked", lane=lane.name, error=lane.blocked)

    @asynccontextmanager
    async def running(self, failed: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Load in the background; a task that dies is reported to `failed`."""
        async with background([*self._workers(), self._ask_for_slow_ones()], failed):
            try:
                yield
            finally:
                self.sink.abort()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Load what `load_now` asks for, and no more."""

        def raise_it(exc: BaseException) -> None:
            raise exc

        async with background(self._workers(), raise_it):
            yield

    def _workers(self) -> list[Coroutine[None, None, None]]:
        return [self._work() for _ in range(self._settings.load_workers)]

    async def _ask_for_slow_ones(self) -> None:
        """For ever: what loads that have been under way for long wait for."""
        while True:
            await asyncio.sleep(SLOW_S / 5)
            slow = [s for s in self.schedules.values() if s.slow_load(_now())]
            waits: dict[str, str] = {}
            with suppress(SinkUnavailable, LaneBlocked):  # the sink has told it
                waits = await self.sink.waits() if slow else {}
            for schedule in slow:
                schedule.waits_for = waits.get(schedule.lane.name) if schedule.busy else None

    def slow_load(self, lane: str) -> SlowLoad | None:
        """The lane's load, if it has been under way for long."""
        return self.schedules[lane].slow_load(_now()) if lane in self.schedules else None

    # --- when ---

    def next_load_seconds(self, lane: str) -> float | None:
        """Seconds until the lane is tried next; None while nothing waits there."""
        schedule = self.schedules.get(lane)
        if schedule is None or not schedule.lane.waiting.events:
            return None
        return max(0.0, schedule.due_at(self._settings) - _now())

    def _pick(self) -> Schedule | None:
        """The lane to load now: of those that are due, the one served longest ago."""
        if self._mirror.pressed:
            self._hurry_fullest()
        now = _now()
        ready = [s for s in self._eligible() if s.due_at(self._settings) <= now]
        return min(ready, key=lambda schedule: schedule.served_at, default=None)

    def _eligible(self) -> list[Schedule]:
        """Lanes that a worker may take once they are due; those that fail share one worker."""
        schedules = self.schedules.values()
        spare = self._settings.load_workers == 1 or not any(
            s.busy and s.failures for s in schedules
        )
        return [
            schedule
            for schedule in schedules
            if not schedule.busy
            and schedule.lane.waiting.events
            and (spare or not schedule.failures)
        ]

    def _hurry_fullest(self) -> None:
        able = [s for s in self.schedules.values() if not s.failures and not s.lane.stuck]
        if able:  # the fullest may be under way: then it is
            max(able, key=lambda s: s.lane.waiting.bytes).hurry()

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            schedule = self._pick()
            if schedule is None:
                await self._sleep()
                continue
            schedule.busy_since = _now()
            try:
                await self._load(schedule)
            except Exception as exc:  # it ends this worker: who waits for the lane must hear of it
                schedule.failed(repr(exc), everywhere=False, now=_now())
                raise
            finally:
                schedule.busy_since = schedule.waits_for = None
                schedule.served_at = _now()
                self._wake.set()

    async def _sleep(self) -> None:
        """Until a lane is due, or something happens."""
        due = [schedule.due_at(self._settings) for schedule in self._eligible()]
        until = max(min(due, default=math.inf), _now() + 0.01)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(until, _now() + _LONGEST_SLEEP_S)):
                await self._wake.wait()

    # --- one load ---

    async def _load(self, schedule: Schedule) -> None:
        """Take what is next of a lane, load it in one transaction, book it, have it removed."""
        lane = schedule.lane
        schedule.begin(_now())
        try:
            segments = await self._mirror.take(lane.name, self._take_bytes())
        except MirrorUnavailable as exc:
            self._put_off(schedule, (), SinkUnavailable(exc.detail, everywhere=False))
            return
        if any(segment.gone for segment in segments):
            segments = await self._without_missing(schedule, segments)
        if not segments:
            schedule.went_on(_now())
            return
        table = table_of(self._registry.types[lane.name])
        started = time.perf_counter()
        try:
            result = await self.sink.load(table, segments, accept_dead=schedule.accept_dead)
        except LaneBlocked as exc:
            self._block(schedule, segments, str(exc))
        except SinkUnavailable as exc:
            self._put_off(schedule, segments, exc)
        except BaseException:
            self._mirror.requeue(lane.name, segments, put_off=False)
            raise
        else:
            self._book(lane, segments, result)
            self._loaded(schedule, result, time.perf_counter() - started, len(segments))

    def _book(self, lane: Lane, segments: Sequence[Segment], result: Loaded) -> None:
        """A load has committed: into the books with it, and out of the mirror."""
        lane.loaded += result.loaded
        lane.duplicate += result.duplicate
        lane.dead += result.dead
        self._buffer.removed.add(sum(len(segment.data) for segment in segments))
        self._mirror.remove(segments)

    async def _without_missing(
        self, schedule: Schedule, segments: Sequence[Segment]
    ) -> list[Segment]:
        """Book what the mirror lost sight of: loaded by another process, or lost; the rest."""
        lane = schedule.lane
        gone = [segment for segment in segments if segment.gone]
        there = [segment for segment in segments if not segment.gone]
        try:
            known = await self.sink.loaded([segment.id for segment in gone])
        except (SinkUnavailable, LaneBlocked) as exc:
            self._put_off(schedule, segments, SinkUnavailable(str(exc)))
            return []
        theirs = [segment for segment in gone if segment.id in known]
        for segment in theirs:
            segment.gone = False
        self._book(lane, theirs, Loaded(duplicate=sum(segment.events for segment in theirs)))
        if lost := [segment for segment in gone if segment.id not in known]:
            # the books stay out of balance, as they should: these events are nowhere
            self._book(lane, lost, Loaded())
            events = sum(segment.events for segment in lost)
            log.error("segments missing in the mirror", lane=lane.name, events=events)
        return there

    def _take_bytes(self) -> int:
        """Rows for one load: what all workers hold must fit the memory that is given."""
        share = self._settings.buffer_max_bytes // (self._settings.load_workers + 1)
        return max(1, min(self._settings.load_trigger_bytes, share))

    def _loaded(self, schedule: Schedule, result: Loaded, seconds: float, segments: int) -> None:
        lane = schedule.lane
        self._observe_load(seconds)
        seconds = round(seconds, 4)
        self._records.loaded(Load(lane.name, result.loaded, result.duplicate, result.dead, seconds))
        log.info(
            "segments loaded", lane=lane.name, segments=segments, rows=result.loaded,
            duplicates=result.duplicate, dead=result.dead, seconds=seconds,
        )  # fmt: skip
        if result.dead:
            log.warning(
                "rows refused", lane=lane.name, rows=result.dead, error="; ".join(result.refused)
            )
        if lane.blocked is not None:
            log.info("lane healed", lane=lane.name)
        lane.blocked, lane.deferred = None, False
        schedule.succeeded(result, seconds, _now())
        for other in self.schedules.values():  # the database is back: no lane need wait for it
            other.forgive_outage()

    def _put_off(
        self, schedule: Schedule, segments: Sequence[Segment], exc: SinkUnavailable
    ) -> None:
        """Again later; while others can be loaded, it must not hold what they need."""
        lane = schedule.lane
        delay = schedule.failed(str(exc), everywhere=exc.everywhere, now=_now())
        self._mirror.requeue(lane.name, segments, put_off=lane.stuck)
        self._records.loaded(Load(lane.name, error=str(exc)))
        log.warning("load failed", lane=lane.name, error=str(exc), retry_seconds=round(delay, 2))

    def _block(self, schedule: Schedule, segments: Sequence[Segment], why: str) -> None:
        """A person must act; it is tried again at each interval all the same."""
        lane = schedule.lane
        if lane.blocked != why:
            log.error("lane blocked", lane=lane.name, error=why)
        lane.blocked = why
        self._mirror.requeue(lane.name, segments, put_off=True)
        self._records.loaded(Load(lane.name, error=f"blocked: {why}"))
        interval = self._settings.load_interval * random.uniform(0.95, 1.05)
        schedule.blocked(why, now=_now(), retry_s=interval)

    # --- on demand ---

    async def load_now(
        self, lanes: Iterable[str] | None = None, *, accept_dead: bool = False
    ) -> tuple[dict[str, int], dict[str, str]]:
        """One try for each lane in which something waits: rows loaded, and what failed, by lane."""
        wanted = list(self._buffer.lanes) if lanes is None else list(lanes)
        loaded: dict[str, int] = {}
        failed: dict[str, str] = {}
        tries = {}
        for name in wanted:
            lane = self._buffer.lanes.get(name)
            if lane is None or not lane.waiting.events:
                continue
            if name in self.schedules:
                tries[name] = self.schedules[name].try_now(accept_dead)
            else:
                failed[name] = f"blocked: {lane.blocked}"
        self._wake.set()
        for name, outcome in tries.items():
            rows, error = await outcome
            if rows:
                loaded[name] = rows
            if error is not None:
                failed[name] = error
        return loaded, failed

    async def drain(self) -> None:
        """Load all that waits; ends when nothing does, or when what is left can't be loaded now."""
        names = [n for n, lane in self._buffer.lanes.items() if lane.blocked is None]
        await self.load_now(names)


def _now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()
