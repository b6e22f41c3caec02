"""The last 15 minutes of every lane, in bounded memory: what the page's charts show."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from datapipe.pipeline.records import Rate

STEP_S = 5.0
POINTS = 180  # of STEP_S each: 15 minutes
RATE_S = 10.0  # "per second" is over the last so many seconds

SERIES = ("accepted", "loaded", "waiting")
Series = dict[str, list[float]]  # by the names above, oldest first


class Reading(NamedTuple):
    """One lane at one moment: counters, and what waits."""

    accepted: int
    loaded: int
    waiting: int


class _Lane:
    """A lane's series. A point is events accepted and loaded per second, and the most that waited
    at any reading: the depth just before each load, however the loads fall."""

    def __init__(self, began: float) -> None:
        self.series: dict[str, deque[float]] = {key: deque(maxlen=POINTS) for key in SERIES}
        self.accepted, self.loaded = Rate(RATE_S), Rate(RATE_S)
        self.opened = self.last = Reading(0, 0, 0)  # a lane comes into being with its first event
        self.peak = 0
        self.busy_at = -math.inf  # when last anything was accepted, loaded or waiting
        self.take(began, self.last)

    def take(self, now: float, reading: Reading) -> None:
        self.accepted.take(reading.accepted, now)
        self.loaded.take(reading.loaded, now)
        if reading.waiting or reading != self.last:
            self.busy_at = now
        self.last, self.peak = reading, max(self.peak, reading.waiting)

    def close(self, seconds: float) -> None:
        """A point is complete; more than one is, after a pause."""
        opened, last = self.opened, self.last
        accepted = round((last.accepted - opened.accepted) / seconds, 1)
        loaded = round((last.loaded - opened.loaded) / seconds, 1)
        times = min(POINTS, max(1, round(seconds / STEP_S)))
        for key, value in zip(SERIES, (accepted, loaded, self.peak), strict=True):
            self.series[key].extend([value] * times)
        self.opened, self.peak = last, last.waiting


class History:
    """Takes a reading of all lanes each second or so; times are of the monotonic clock.

    Attributes:
        closed: how many times points were added, so that a reader sees whether there is news.
    """

    def __init__(self, now: float) -> None:
        self.closed = 0
        self._opened_at = self._taken_at = now
        self._lanes: dict[str, _Lane] = {}

    def take(self, now: float, lanes: Mapping[str, Reading]) -> None:
        """Note how the lanes are now."""
        seconds = now - self._opened_at
        due = seconds >= STEP_S - 0.01
        for name, reading in lanes.items():
            if name not in self._lanes:
                self._lanes[name] = _Lane(self._taken_at)
            lane = self._lanes[name]
            lane.take(now, reading)
            if due:
                lane.close(seconds)
        self._taken_at = now
        if due:
            self._opened_at = now
            self.closed += 1

    def rates(self, name: str) -> tuple[float, float]:
        """Events accepted and loaded per second, over the last RATE_S."""
        if (lane := self._lanes.get(name)) is None:
            return 0.0, 0.0
        return round(lane.accepted.per_second(), 1), round(lane.loaded.per_second(), 1)

    def idle(self, name: str) -> bool:
        """Nothing was accepted, loaded or waiting within the time that the charts show."""
        lane = self._lanes.get(name)
        return lane is None or self._taken_at - lane.busy_at >= POINTS * STEP_S

    def series(self) -> Iterator[tuple[str, Series]]:
        """All points, by lane; a younger one has fewer."""
        for name, lane in sorted(self._lanes.items()):
            yield name, {key: list(values) for key, values in lane.series.items()}
