"""The last 15 minutes of every lane, in bounded memory: what the page's pictures show."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STEP_S = 5.0
POINTS = 180  # of STEP_S each: 15 minutes
RATE_S = 10.0  # the time over which "per second" is told

SERIES = ("accepted", "loaded", "waiting")
Point = tuple[float, float, int]


class Reading(NamedTuple):
    """One lane at one moment: counters, and what waits."""

    accepted: int
    loaded: int
    waiting: int


def _rates(first: Reading, last: Reading, seconds: float) -> tuple[float, float]:
    """Events accepted and loaded per second, from one reading to another."""
    accepted, loaded = last.accepted - first.accepted, last.loaded - first.loaded
    return round(accepted / seconds, 1), round(loaded / seconds, 1)


class _Lane:
    """A lane's series. A point is events accepted and loaded per second, and the most that waited
    at any reading: the depth just before each load, however the loads fall."""

    def __init__(self) -> None:
        self.points: deque[Point] = deque(maxlen=POINTS)
        self.opened: Reading | None = None  # where the point that is being made began
        self.peak = 0

    def close(self, reading: Reading, seconds: float) -> None:
        first = self.opened or Reading(0, 0, 0)  # a lane comes into being with its first event
        times = min(POINTS, max(1, round(seconds / STEP_S)))  # more than one after a pause
        point = (*_rates(first, reading, seconds), max(self.peak, reading.waiting))
        self.points.extend([point] * times)
        self.opened, self.peak = reading, reading.waiting


class History:
    """Takes a reading of all lanes each second or so; times are of the monotonic clock.

    Attributes:
        closed: how many times points were added, so that a reader sees whether there is news.
    """

    def __init__(self, now: float) -> None:
        self.closed = 0
        self._began = now
        self._lanes: dict[str, _Lane] = {}
        self._latest: deque[tuple[float, dict[str, Reading]]] = deque([(now, {})])

    def take(self, now: float, lanes: Mapping[str, Reading]) -> None:
        """Note how the lanes are now."""
        self._latest.append((now, dict(lanes)))
        while len(self._latest) > 2 and self._latest[1][0] <= now - RATE_S:
            self._latest.popleft()
        seconds = now - self._began
        due = seconds >= STEP_S - 0.01
        for name, reading in lanes.items():
            lane = self._lanes.setdefault(name, _Lane())
            lane.peak = max(lane.peak, reading.waiting)
            if due:
                lane.close(reading, seconds)
        if due:
            self._began = now
            self.closed += 1

    def rates(self, name: str) -> tuple[float, float]:
        """Events accepted and loaded per second, over the last RATE_S."""
        (began, first), (ended, last) = self._latest[0], self._latest[-1]
        if name not in last or ended <= began:
            return 0.0, 0.0
        return _rates(first.get(name, Reading(0, 0, 0)), last[name], ended - began)

    def points(self) -> dict[str, list[Point]]:
        """All points by lane, oldest first, as they are now; a younger lane has fewer."""
        return {name: list(lane.points) for name, lane in sorted(self._lanes.items())}


def series_of(points: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, list[float]]]:
    """The same, each number in a list of its own."""
    lanes = {}
    for name, of_lane in points.items():
        columns = zip(*of_lane, strict=True) if of_lane else ((), (), ())
        lanes[name] = {key: list(column) for key, column in zip(SERIES, columns, strict=True)}
    return lanes
