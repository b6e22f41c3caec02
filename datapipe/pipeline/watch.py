"""Watch: which other processes are dead, by their heartbeats in the database.

Dead means: the count of beats has not changed for some intervals by our own clock, while the
database was up. The times in the database don't show it: after an outage all rows are old, and
clocks differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from datapipe.sinks import Beat


class Watch:
    """All times are of the monotonic clock, in seconds."""

    def __init__(self, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._beats: Mapping[str, Beat] = {}
        self._since: dict[str, float] = {}  # when the last beat was seen; inf: not watched yet
        self._now = 0.0

    def note(self, beats: Mapping[str, Beat], now: float) -> None:
        """The database has just returned these beats, by process."""
        if now - self._now > self._dead_after_s / 2:  # we were suspended ourselves, or are new
            self.lost_sight()
        for process in beats.keys() | self._since.keys():
            beaten = beats.get(process) != self._beats.get(process)
            self._since[process] = now if beaten else min(now, self._since.get(process, now))
        self._beats = dict(beats)
        self._now = now

    def lost_sight(self) -> None:
        """The database does not answer: no process can be seen alive, so watching starts over."""
        self._since = dict.fromkeys(self._since, math.inf)

    def is_dead(self, process: str) -> bool:
        """Whether the process is taken to be dead; one never heard of is watched from now on."""
        beat = self._beats.get(process)
        if beat is not None and beat.ended:
            return True
        return self._now - self._since.setdefault(process, math.inf) >= self._dead_after_s

    def living(self) -> dict[str, Beat]:
        """The last beats of those that have neither ended nor are taken to be dead."""
        return {process: beat for process, beat in self._beats.items() if not self.is_dead(process)}

    def dead(self) -> set[str]:
        """All processes that are watched and taken to be dead."""
        return {process for process in self._since if self.is_dead(process)}
