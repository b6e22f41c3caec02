"""Watch: which other processes are silent, by their heartbeats in the database.

Silent means: the count of beats stood still for some intervals as watched by us, while the database
was up. The database's own times don't tell: after an outage all rows are old, and clocks differ.
"""

from __future__ import annotations

from collections.abc import Mapping

from datapipe.sinks import Beat


class Watch:
    """All times are of the monotonic clock, in seconds."""

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._beats: Mapping[str, Beat] = {}
        self._since: dict[str, float] = {}
        self._asked: set[str] = set()  # never heard of, or not since we lost sight
        self._now = 0.0

    def note(self, beats: Mapping[str, Beat], now: float) -> None:
        """The database just told these beats, by process."""
        if now - self._now > self._silent_after_s / 2:  # we were stopped ourselves, or are new
            self.lost_sight()
        for process in beats.keys() | self._since.keys() | self._asked:
            if beats.get(process) != self._beats.get(process) or process not in self._since:
                self._since[process] = now
        self._asked.clear()
        self._beats = dict(beats)
        self._now = now

    def lost_sight(self) -> None:
        """The database does not answer: nobody can be seen to live, so all start anew."""
        self._since.clear()

    def silent(self, process: str) -> bool:
        """Whether the process is taken to be dead; one never heard of is watched from now on."""
        beat = self._beats.get(process)
        if beat is not None and beat.ended:
            return True
        if process not in self._since:
            self._asked.add(process)
            return False
        return self._now - self._since[process] >= self._silent_after_s

    def dead(self) -> set[str]:
        """All processes that the database names and that are taken to be dead."""
        return {process for process in self._beats if self.silent(process)}
