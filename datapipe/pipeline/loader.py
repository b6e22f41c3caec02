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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from datapipe.errors import DatapipeError, LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.events.registry import Registry
from datapipe.events.segment import Segment
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.coordinator import Housekeeper
from datapipe.pipeline.lane import Lane
from datapipe.pipeline.records import Load, Recent
from datapipe.pipeline.schedule import SLOW_S, Schedule, SlowLoad
from datapipe.settings import Settings
from datapipe.sinks import Loaded, Sink, table_of

_LONGEST_SLEEP_S = 3600.0  # event loops don't like timers without end

log = structlog.stdlib.get_logger("datapipe.pipeline.loader")


class Loader:
    """Moves what waits in the buffer into the sink."""

    def __init__(
        self,
        buffer: Buffer,
        sink: Sink,
        registry: Registry,
        settings: Settings,
        process: str,
        observe_load: Callable[[float], None],
    ) -> None:
        self.sink = sink
        self.schedules: dict[str, Schedule] = {}
        self.recent = Recent()
        self._buffer = buffer
        self._registry = registry
        self._settings = settings
        self._observe_load = observe_load
        self._wake = asyncio.Event()
        self._asleep_until = 0.0
        buffer.on_change = self._changed
        for name in registry.types:
            self._schedule(buffer.lane(name))
        tables = [table_of(kind) for kind in registry.types.values()]
        self.house = Housekeeper(buffer, sink, process, self.recovered, tables)

    def _schedule(self, lane: Lane) -> Schedule:
        if lane.name not in self.schedules:
            self.schedules[lane.name] = Schedule(lane, _now())
            if lane.name not in self._registry.types:
                lane.blocked = (
                    f"no event type {lane.name!r} is registered here; its events are kept: add its "
                    "class (event_modules) or its fields (events)"
                )
                log.error("lane blocked", lane=lane.name, error=lane.blocked)
        return self.schedules[lane.name]

    @asynccontextmanager
    async def running(self, failed: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Load and keep house in the background.

        A task that dies is told to `failed`: nothing dies in silence.
        """
        house = self.house
        upkeep = [house.recover(), house.prepare(), house.beat(), house.keep()]
        work = [*self._workers(), self._ask_for_slow_ones(), *upkeep]
        async with background(work, failed):
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

    def _changed(self, lane: Lane) -> None:
        """Something was stored in a lane."""
        due_at = self._schedule(lane).due_at(self._settings)
        if due_at < self._asleep_until or self._buffer.pressed:
            self._wake.set()

    def recovered(self, lanes: Iterable[str]) -> None:
        """What was recovered is loaded without waiting for the interval."""
        for name in lanes:
            self._schedule(self._buffer.lane(name)).hurry()
        self._wake.set()

    def next_load_seconds(self, lane: str) -> float | None:
        """Seconds until the lane is tried next; None while nothing waits there."""
        schedule = self.schedules.get(lane)
        if schedule is None or not schedule.lane.waiting or lane not in self._registry.types:
            return None
        return max(0.0, schedule.due_at(self._settings) - _now())

    def _pick(self) -> Schedule | None:
        """The lane to load now: of those that are due, the one served longest ago."""
        if self._buffer.pressed:
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
            and schedule.lane.waiting
            and schedule.lane.name in self._registry.types
            and (spare or not schedule.failures)
        ]

    def _hurry_fullest(self) -> None:
        able = [s for s in self.schedules.values() if not s.failures and not s.lane.stuck]
        if able:  # the fullest may be under way: then it is
            max(able, key=lambda s: s.lane.waiting_bytes).hurry()

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
        self._asleep_until = max(min(due, default=math.inf), _now() + 0.01)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(self._asleep_until, _now() + _LONGEST_SLEEP_S)):
                await self._wake.wait()

    # --- one load ---

    async def _load(self, schedule: Schedule) -> None:
        lane = schedule.lane
        schedule.begin(_now())
        try:
            segments = await self._buffer.take(lane, self._take_bytes())
        except MirrorUnavailable as exc:
            self._put_off(schedule, SinkUnavailable(exc.detail, everywhere=False))
            return
        if not segments:
            schedule.end(_now())
            return
        if gone := [segment for segment in segments if segment.gone]:
            await self._look_up(schedule, gone)
            segments = [segment for segment in segments if not segment.gone]
            if not segments:
                schedule.went_on(_now())
                return
        started = time.perf_counter()
        ahead = asyncio.create_task(self._read_ahead(lane))
        try:
            result = await self.sink.load(
                table_of(self._registry.types[lane.name]), segments,
                accept_dead=schedule.accept_dead,
            )  # fmt: skip
        except (SinkUnavailable, LaneBlocked) as exc:
            await ahead  # before the lane is parked: else what is given back is passed over
            if isinstance(exc, LaneBlocked):
                self._block(schedule, str(exc))
            else:
                self._put_off(schedule, exc)
            self._buffer.give_back(lane, segments)
        except BaseException:
            self._buffer.give_back(lane, segments)
            raise
        else:
            seconds = time.perf_counter() - started
            self._buffer.loaded(lane, segments, result.loaded, result.duplicate, result.dead)
            self._loaded(schedule, result, seconds, len(segments))
        finally:
            await ahead

    async def _read_ahead(self, lane: Lane) -> None:
        with suppress(MirrorUnavailable):  # `take` meets it again
            await self._buffer.read_ahead(lane, self._take_bytes())

    async def _look_up(self, schedule: Schedule, gone: Sequence[Segment]) -> None:
        """Segments that the mirror lost sight of: loaded by another process, or lost."""
        lane = schedule.lane
        try:
            known = await self.sink.loaded([segment.id for segment in gone])
        except (SinkUnavailable, LaneBlocked) as exc:
            self._buffer.give_back(lane, gone)
            self._put_off(schedule, SinkUnavailable(str(exc)))
            return
        theirs = [segment for segment in gone if segment.id in known]
        self._buffer.loaded(lane, theirs, 0, sum(s.events for s in theirs), 0)
        if lost := [segment for segment in gone if segment.id not in known]:
            # the books stay out of balance, as they should: these events are nowhere
            self._buffer.loaded(lane, lost, 0, 0, 0)
            events = sum(segment.events for segment in lost)
            log.error("segments missing in the mirror", lane=lane.name, events=events)

    def _take_bytes(self) -> int:
        """Rows for one load: what all workers hold must fit the memory that is given."""
        share = self._settings.buffer_max_bytes // (self._settings.load_workers + 1)
        return max(1, min(self._settings.load_trigger_bytes, share))

    def _loaded(self, schedule: Schedule, result: Loaded, seconds: float, segments: int) -> None:
        lane = schedule.lane
        self._observe_load(seconds)
        seconds = round(seconds, 4)
        self.recent.loaded(Load(lane.name, result.loaded, result.duplicate, result.dead, seconds))
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

    def _put_off(self, schedule: Schedule, exc: SinkUnavailable) -> None:
        delay = schedule.failed(str(exc), everywhere=exc.everywhere, now=_now())
        if schedule.lane.deferred:  # others can be loaded: it must not hold what they need
            self._buffer.park_all(schedule.lane)
        self.recent.loaded(Load(schedule.lane.name, error=str(exc)))
        log.warning(
            "load failed", lane=schedule.lane.name, error=str(exc), retry_seconds=round(delay, 2)
        )

    def _block(self, schedule: Schedule, why: str) -> None:
        lane = schedule.lane
        if lane.blocked != why:
            log.error("lane blocked", lane=lane.name, error=why)
        lane.blocked = why
        self.recent.loaded(Load(lane.name, error=f"blocked: {why}"))
        interval = self._settings.load_interval * random.uniform(0.95, 1.05)
        schedule.blocked(why, now=_now(), retry_s=interval)
        self._buffer.park_all(lane)

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
            if lane is None or not lane.waiting:
                continue
            if name not in self._registry.types:
                failed[name] = f"blocked: {self._buffer.lanes[name].blocked}"
            else:
                tries[name] = self._schedule(lane).try_now(accept_dead)
        self._wake.set()
        for name, outcome in tries.items():
            rows, error = await outcome
            if rows:
                loaded[name] = rows
            if error is not None:
                failed[name] = error
        return loaded, failed

    async def farewell(self) -> None:
        """Tell the others that this process beats no more, if the database listens.

        When they hear it, nothing that they may load is reserved by us.
        """
        await self._buffer.mirror.release_all()
        if self.sink.state().up:
            with suppress(DatapipeError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self.house.tidy(ended=True)

    async def drain(self) -> None:
        """Load all that waits; ends when nothing does, or when what is left can't be loaded now."""
        names = [n for n, lane in self._buffer.lanes.items() if lane.blocked is None]
        await self.load_now(names)


def _now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def background(
    work: Sequence[Coroutine[None, None, None]], failed: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """Tasks that live as long as the block; one that dies is told to `failed`.

    To end by a cancellation that nobody asked for is to die, too.
    """

    def watch(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if (exc := task.exception()) is not None:
                failed(exc)
        elif not task.cancelling():
            failed(RuntimeError(f"cancelled by nobody: {task.get_coro()}"))

    tasks = [asyncio.create_task(each) for each in work]
    for task in tasks:
        task.add_done_callback(watch)
    try:
        yield
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end.

    `asyncio.wait_for` of Python 3.11, on which aiopg waits, drops a cancellation that comes at the
    moment at which what it waits for ends (python/cpython issue 81839).
    """
    pending: set[asyncio.Task[None]] = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
