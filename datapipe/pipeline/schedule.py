"""Schedule: when one lane is due, and what became of its last load."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import NamedTuple

from datapipe.pipeline.lane import Lane
from datapipe.pipeline.records import Load
from datapipe.settings import Settings

AWAITED_S = 0.1  # between two loads of a lane for POSTs that wait: one serves all of them


class Try(NamedTuple):
    """A request to load the lane now; its outcome: the rows of the turn, and the error, if any."""

    outcome: asyncio.Future[tuple[int, str | None]]
    accept_dead: bool


class Schedule:
    """Why a lane is to be loaded, as data; all times are by the event loop's clock, in seconds.

    A turn is as many transactions as it takes to load all that waited at its start; a failure ends
    it, too.

    Attributes:
        served_at: when its last transaction ended.
        failures: in a row; 0 again once other lanes can be loaded.
        alone: others could be loaded since it failed.
        exhausted_at: when last nothing could be taken.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.served_at = now()
        self.failures = 0
        self.alone = False
        self.exhausted_at = -math.inf
        self.last_load: Load | None = None
        self._hurry = False
        self._began_at = -math.inf  # of its last transaction
        self._retry_at = 0.0
        self._turn_ended = now()
        self._turn_until: int | None = None  # the lane's `total_out` at which this turn is over
        self._turn_rows = 0
        self._under_way: Callable[[], None]  # to be called when the load ends
        self._tries: list[Try] = []  # served by the load under way
        self._next_tries: list[Try] = []  # requested since it began

    @property
    def busy(self) -> bool:
        """Whether a load is under way."""
        return self.lane.health.busy

    # --- when ---

    def due_at(self, settings: Settings) -> float:
        """When this lane is to be loaded, if something waits."""
        if self._hurry or self._next_tries:
            return 0.0
        if self.failures:
            return self._retry_at
        if self._turn_until is not None:
            return 0.0
        enough = self.lane.waiting.bytes >= settings.load_trigger_bytes
        interval = min(settings.load_interval, settings.load_min_interval if enough else 1e9)
        due_at = self._turn_ended + interval
        return min(due_at, self._began_at + AWAITED_S) if self.lane.awaited else due_at

    def hurry(self) -> None:
        """Due at once, whatever the intervals say; after failures it keeps its back-off."""
        if not self.failures:
            self._hurry = True

    def try_now(self, accept_dead: bool) -> asyncio.Future[tuple[int, str | None]]:
        """Due at once, also while it backs off; see `Try`."""
        wanted = Try(asyncio.Future(), accept_dead)
        self._next_tries.append(wanted)
        if self._turn_until is not None:
            self._turn_until = self._end_of_all()
        return wanted.outcome

    def others_loaded(self) -> None:
        """The database answers: a lane that failed only because it did not is due at once."""
        if self.failures and not self.lane.stuck:
            self.failures, self.alone, self._hurry = 0, True, True
            self.lane.health.forgive()

    # --- what happens ---

    def begin(self) -> bool:
        """A transaction starts, perhaps the first of a turn; whether dead letters are accepted."""
        self._under_way = self.lane.health.begin("a load")
        self._began_at = now()
        self._hurry = False
        self._tries += self._next_tries
        self._next_tries = []
        if self._turn_until is None:
            self._turn_until = self._end_of_all()
            self._turn_rows = 0
        return any(wanted.accept_dead for wanted in self._tries)

    def _end_of_all(self) -> int:
        """`total_out` once all that waits now is loaded; lost events don't wait."""
        return self.lane.total_out + self.lane.waiting.events

    def succeeded(self, rows: int = 0) -> None:
        """Some of what waited is loaded; perhaps the turn is over."""
        self._turn_rows += rows
        until = self._turn_until
        if until is None or self.lane.total_out >= until or not self.lane.waiting.events:
            self._finish_turn()

    def exhausted(self) -> None:
        """Nothing could be taken: the turn is over, whatever waits for other processes."""
        self.exhausted_at = now()
        self._finish_turn()

    def failed(self, error: str, retry_s: float) -> None:
        """A load failed; it is retried after `retry_s`, or at once if that was requested."""
        self.failures += 1
        self._retry_at = now() + retry_s
        self._end_turn(error)

    def _finish_turn(self) -> None:
        """Nothing is left: whoever has asked for a try since it began is served, too."""
        self._tries += self._next_tries
        self._next_tries = []
        self._end_turn(None)

    def _end_turn(self, error: str | None) -> None:
        self._turn_until, self._turn_ended = None, now()
        tries, self._tries = self._tries, []
        for each in tries:
            if not each.outcome.done():
                each.outcome.set_result((self._turn_rows, error))

    def end(self) -> None:
        """The transaction is over."""
        self._under_way()
        self.served_at = now()


def now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()
