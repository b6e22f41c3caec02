"""Schedule: when one lane is due, and what became of its last load."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from datapipe.pipeline.lane import Lane
from datapipe.retry import backoff
from datapipe.settings import Settings
from datapipe.sinks import Loaded

# The longest wait after failures in a row, seconds. Small for a database that is away: its return
# should not find everybody asleep.
_OUTAGE_S = 2.0
_LANE_S = 30.0
SLOW_S = 10.0  # a load that takes longer is named


@dataclass(slots=True, frozen=True)
class LastLoad:
    """The last load that committed; `at` is Unix time."""

    at: float
    rows: int
    seconds: float


@dataclass(slots=True, frozen=True)
class SlowLoad:
    """A load that has been under way for long, and what it waits for, if that is known."""

    seconds: float
    waits_for: str | None


class Schedule:
    """All times are of the monotonic clock, in seconds."""

    def __init__(self, lane: Lane, now: float) -> None:
        self.lane = lane
        self.busy_since: float | None = None  # a load is under way
        self.waits_for: str | None = None  # what it waits for, as the database tells
        self.served_at = now
        self.accept_dead = False
        self.failures = 0
        self.error: str | None = None
        self.last_load: LastLoad | None = None
        self._turn_ended = now
        self._turn: int | None = None  # what will have gone when this turn is over
        self._retry_at = 0.0
        self._everywhere = False
        self._alone = False  # others could be loaded since it failed
        self._hurry = False
        self._rows_of_turn = 0
        self._callers: list[asyncio.Future[tuple[int, str | None]]] = []

    @property
    def busy(self) -> bool:
        return self.busy_since is not None

    def slow_load(self, now: float) -> SlowLoad | None:
        """The load under way, if that is longer than `SLOW_S`."""
        if self.busy_since is None or now - self.busy_since < SLOW_S:
            return None
        return SlowLoad(now - self.busy_since, self.waits_for)

    def due_at(self, settings: Settings) -> float:
        """When this lane is to be loaded, if something waits."""
        if self._hurry:
            return 0.0
        if self.failures:
            return self._retry_at
        if self._turn is not None:
            return 0.0
        enough = self.lane.waiting.bytes >= settings.load_trigger_bytes
        interval = min(settings.load_interval, settings.load_min_interval if enough else 1e9)
        return self._turn_ended + interval

    def hurry(self) -> None:
        """Due at once, whatever the intervals say; after failures it keeps its back-off."""
        if not self.failures:
            self._hurry = True

    def try_now(self, accept_dead: bool) -> asyncio.Future[tuple[int, str | None]]:
        """Due at once; the future tells the rows of the turn, and the error if it failed."""
        outcome: asyncio.Future[tuple[int, str | None]] = asyncio.Future()
        self._callers.append(outcome)
        self._hurry = True
        self.accept_dead = self.accept_dead or accept_dead
        if self._turn is not None:
            self._turn = self._end_of_all()
        return outcome

    def begin(self, now: float) -> None:
        """A transaction starts: the first of a turn marks what belongs to it."""
        self._hurry = False
        if self._turn is None:
            self._turn = self._end_of_all()
            self._rows_of_turn = 0

    def _end_of_all(self) -> int:
        """What will have gone once all that waits now is loaded; lost events don't wait."""
        return self.lane.total_out + self.lane.waiting.events

    def end(self, now: float) -> None:
        """The turn is over."""
        self._turn = None
        self._turn_ended = now
        self._tell(None)

    def succeeded(self, result: Loaded, seconds: float, now: float) -> None:
        """A load has committed."""
        self.failures, self.error, self._alone = 0, None, False
        self.last_load = LastLoad(time.time(), result.loaded, seconds)
        self._rows_of_turn += result.loaded
        self.went_on(now)

    def went_on(self, now: float) -> None:
        """Some of what waited is booked; perhaps the turn is over."""
        if self._turn is None or self.lane.total_out >= self._turn or not self.lane.waiting.events:
            self.end(now)

    def failed(self, error: str, *, everywhere: bool, now: float) -> float:
        """A load failed and will be tried again; the seconds until then.

        What is said to be the whole database and yet concerns this lane alone (the disk of its
        table is full) puts off this lane alone.
        """
        self.failures += 1
        self.error = error
        self._everywhere = everywhere and not self._alone
        self.lane.deferred = self.lane.deferred or not self._everywhere
        delay = backoff(self.failures, _OUTAGE_S if everywhere else _LANE_S)
        self._retry_at = now + delay
        self._tell(error)
        return delay

    def blocked(self, error: str, *, now: float, retry_s: float) -> None:
        """A person must act; tried again after `retry_s` all the same."""
        self.failures += 1
        self.error = error
        self._everywhere = False
        self._retry_at = now + retry_s
        self._turn = None
        self._tell(f"blocked: {error}")

    def forgive_outage(self) -> None:
        """The database answers again: what failed only because it did not may go at once."""
        if self.failures and self._everywhere:
            self.failures, self._everywhere, self._alone = 0, False, True
            self._hurry = True

    def _tell(self, error: str | None) -> None:
        callers, self._callers = self._callers, []
        self.accept_dead = False
        for caller in callers:
            if not caller.done():
                caller.set_result((self._rows_of_turn, error))
