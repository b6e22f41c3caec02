"""Health: whether a part works, by the outcome of its last real work; never by a probe.

Each part of the service keeps one, and `monitor` makes the summary of them alone: so whatever fails
for ever, or hangs, is seen by one rule.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

SLOW_S = 10.0  # work that takes longer is a trouble


class Wait(NamedTuple):
    """What work under way waits for.

    Attributes:
        event: its name, where one can look it up.
        meaning: in plain words, where that is known: a sentence without its end.
        remedy: what a person can do about it, in whole sentences.
    """

    event: str
    meaning: str = ""
    remedy: str = ""


class Health:
    """One part, such as the database, or the loads of a lane.

    Work overlaps: what began before the part failed says nothing of how it is since, and neither
    does a failure of what began before it last worked. So each outcome names when its work began
    (`time.perf_counter`), and one that is overtaken is ignored.

    Attributes:
        part: what kind of work it does, such as `heartbeat`.
        lane: whose, if it works for one lane alone.
        up: None until the first real work has ended.
        since, at: Unix times at which `up` became what it is, and at which its last work ended.
        error: of the last failure, while it is down.
        waits_for: what the work under way waits for, if that is known; set by who knows it.
    """

    def __init__(self, part: str = "", lane: str | None = None, *, up: bool | None = None) -> None:
        self.part = part
        self.lane = lane
        self.up = up
        self.since = self.at = time.time()
        self.error: str | None = None
        self.waits_for: Wait | None = None
        self._worked_at = self._failed_at = 0.0
        self._under_way: dict[object, tuple[str, float]] = {}  # oldest first

    def works(self, began: float) -> bool:
        """Work that began then has succeeded; whether the part was not up before."""
        if began < self._failed_at:
            return False
        came_up = not self.up
        self._become(True, None)
        self._worked_at = time.perf_counter()
        return came_up

    def fails(self, began: float, error: str) -> bool:
        """Work that began then has failed, and the part is why; whether it was not down before."""
        if began < self._worked_at:
            return False
        went_down = self.up is not False
        self._become(False, error)
        self._failed_at = time.perf_counter()
        return went_down

    def forgive(self) -> None:
        """It failed of something that is over; whether it works, its next work will show."""
        self._become(None, None)

    def _become(self, up: bool | None, error: str | None) -> None:
        self.at = time.time()
        if up is not self.up:
            self.since = self.at
        self.up, self.error = up, error

    # --- work under way ---

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return bool(self._under_way)

    @property
    def slow(self) -> bool:
        """Whether work has been under way for too long."""
        began = self._began
        return began is not None and time.monotonic() - began >= SLOW_S

    @property
    def _began(self) -> float | None:
        return next(iter(self._under_way.values()))[1] if self._under_way else None

    def begin(self, what: str) -> Callable[[], None]:
        """Work is under way until the result is called; that says nothing of its outcome."""
        work = object()
        self._under_way[work] = (what, time.monotonic())

        def end() -> None:
            del self._under_way[work]
            if not self._under_way:
                self.waits_for = None

        return end

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Work is under way in the block; that says nothing of its outcome."""
        end = self.begin(what)
        try:
            yield
        finally:
            end()

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Work is under way in the block, and an error that leaves it is the part's failure."""
        began = time.perf_counter()
        with self.doing(what):
            try:
                yield
            except Exception as exc:
                self.fails(began, str(exc) or repr(exc))
                raise
        self.works(began)

    def follow(self, what: str, work: asyncio.Future[None]) -> None:
        """The same for what runs by itself."""
        end, began = self.begin(what), time.perf_counter()

        def ended(work: asyncio.Future[None]) -> None:
            end()
            with suppress(asyncio.CancelledError):
                if (exc := work.exception()) is None:
                    self.works(began)
                else:
                    self.fails(time.perf_counter(), repr(exc))  # it is not tried again

        work.add_done_callback(ended)

    def state(self) -> dict[str, Any]:
        """How it is now: its attributes, and its oldest work under way; times are Unix times."""
        doing = doing_since = None
        if (began := self._began) is not None:
            doing = next(iter(self._under_way.values()))[0]
            doing_since = time.time() - (time.monotonic() - began)
        wait = self.waits_for
        return {
            "part": self.part, "lane": self.lane, "up": self.up, "since": self.since,
            "at": self.at, "error": self.error, "doing": doing, "doing_since": doing_since,
            "slow": self.slow, "waits_for": wait and wait.event,
            "meaning": wait and wait.meaning, "remedy": wait and wait.remedy,
        }  # fmt: skip
