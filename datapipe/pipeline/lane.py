"""Lane: the way of one event type, with its queue and its books."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from datapipe.events.segment import Segment
from datapipe.mirrors import Run


class Totals:
    """Bytes over all lanes, kept while segments come and go.

    A batch can touch thousands of lanes, and each of them asks for these: adding them up anew each
    time held up the event loop for seconds.

    Attributes:
        memory: of segments in memory, with their overhead.
        waiting: of rows that wait in lanes that can be loaded; `stuck`, in those that can't.
    """

    def __init__(self) -> None:
        self.memory = 0
        self.waiting = 0
        self.stuck = 0


class Lane:
    """What waits of one event type, and the counts of what came and went.

    A segment waits in `returned` (a load that failed gave it back), then in `queue`, then parked
    in one of `runs`, and is counted in memory while it is being loaded.
    """

    def __init__(self, name: str, totals: Totals) -> None:
        self.name = name
        self._totals = totals
        self.queue: asyncio.Queue[Segment] = asyncio.Queue()
        self.returned: deque[Segment] = deque()
        self.runs: dict[str, Run] = {}  # by source
        self._blocked: str | None = None
        self._deferred = False
        self.accepted = 0
        self.recovered = 0
        self.loaded = 0
        self.duplicate = 0
        self.dead = 0
        self.in_memory = 0  # events
        self.segments_in_memory: dict[str, Segment] = {}  # by id, taken ones too
        self.memory_bytes = 0
        self.rows_bytes = 0

    @property
    def blocked(self) -> str | None:
        """Why a person must act."""
        return self._blocked

    @blocked.setter
    def blocked(self, why: str | None) -> None:
        self._set_stuck(why, self._deferred)

    @property
    def deferred(self) -> bool:
        """Put off: its last load failed."""
        return self._deferred

    @deferred.setter
    def deferred(self, deferred: bool) -> None:
        self._set_stuck(self._blocked, deferred)

    def _set_stuck(self, blocked: str | None, deferred: bool) -> None:
        waiting = self.waiting_bytes
        self._count_waiting(-waiting)
        self._blocked, self._deferred = blocked, deferred
        self._count_waiting(waiting)

    @property
    def stuck(self) -> bool:
        """It can't be loaded while others can: it holds no memory, and only part of the mirror."""
        return self._blocked is not None or self._deferred

    @property
    def parked(self) -> int:
        return sum([run.events for run in self.runs.values()]) if self.runs else 0

    @property
    def waiting(self) -> int:
        return self.in_memory + self.parked

    @property
    def waiting_bytes(self) -> int:
        parked = sum([run.bytes for run in self.runs.values()]) if self.runs else 0
        return self.rows_bytes + parked

    @property
    def came(self) -> int:
        """Events that ever came into this lane."""
        return self.accepted + self.recovered

    @property
    def went(self) -> int:
        """Events that left this lane for good."""
        return self.loaded + self.duplicate + self.dead

    @property
    def balanced(self) -> bool:
        """`waiting` is counted where segments lie, so this can fail."""
        return self.came == self.went + self.waiting

    @property
    def oldest(self) -> float | None:
        """Unix time of the oldest event that waits; what was recovered is older than its place."""
        times = [segment.created_at for segment in self.segments_in_memory.values()]
        times += [run.oldest for run in self.runs.values()]
        return min(times, default=None)

    def oldest_seconds(self) -> float:
        oldest = self.oldest
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def hold(self, segment: Segment) -> None:
        """Count a segment in memory."""
        self.segments_in_memory[segment.id] = segment
        self._count_memory(segment, 1)

    def release(self, segment: Segment) -> None:
        """Count it out of memory."""
        del self.segments_in_memory[segment.id]
        self._count_memory(segment, -1)

    def park(self, segment: Segment) -> None:
        """Count a segment, whose rows memory forgets, into the run that it borders on."""
        self.park_run(
            Run(
                self.name, segment.source, segment.position - 1, segment.position, 1,
                segment.events, len(segment.data), segment.created_at,
            )
        )  # fmt: skip

    def park_run(self, run: Run) -> None:
        """Count segments that lie in the mirror, as a part of the run that their source has."""
        self._count_waiting(run.bytes)
        known = self.runs.setdefault(run.source, run)
        if known is not run:
            known.after = min(known.after, run.after)
            known.until = max(known.until, run.until)
            known.segments += run.segments
            known.events += run.events
            known.bytes += run.bytes
            known.oldest = min(known.oldest, run.oldest)

    def unpark(self, run: Run, segment: Segment) -> None:
        """Count a segment in memory that was read from a run."""
        run.segments -= 1
        run.events -= segment.events
        run.bytes -= len(segment.data)
        run.oldest = segment.created_at
        self._count_waiting(-len(segment.data))
        self.hold(segment)

    def end_run(self, run: Run) -> None:
        """All of it was read."""
        del self.runs[run.source]
        self._count_waiting(-run.bytes)

    def _count_memory(self, segment: Segment, sign: int) -> None:
        self.in_memory += sign * segment.events
        self.memory_bytes += sign * segment.bytes
        self.rows_bytes += sign * len(segment.data)
        self._totals.memory += sign * segment.bytes
        self._count_waiting(sign * len(segment.data))

    def _count_waiting(self, size: int) -> None:
        if self.stuck:
            self._totals.stuck += size
        else:
            self._totals.waiting += size
