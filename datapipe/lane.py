"""Lane: the way of one event type, with its queue and its books."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from datapipe.mirrors import Run
from datapipe.segment import Segment


class Lane:
    """What waits of one event type, and the counts of what came and went.

    A segment waits in `returned` (a load that failed gave it back), then in `queue`, then parked
    in one of `runs`, and is counted in memory while it is being loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: asyncio.Queue[Segment] = asyncio.Queue()
        self.returned: deque[Segment] = deque()
        self.runs: dict[str, Run] = {}  # by source
        self.blocked: str | None = None
        self.deferred = False  # put off: its last load failed
        self.accepted = 0
        self.recovered = 0
        self.loaded = 0
        self.duplicate = 0
        self.dead = 0
        self.in_memory = 0  # events
        self.segments_in_memory: dict[str, Segment] = {}  # by id, oldest first, taken ones too
        self.memory_bytes = 0
        self.rows_bytes = 0

    @property
    def stuck(self) -> bool:
        """It can't be loaded while others can: it holds no memory, and only part of the mirror."""
        return self.blocked is not None or self.deferred

    @property
    def parked(self) -> int:
        return sum(run.events for run in self.runs.values())

    @property
    def waiting(self) -> int:
        return self.in_memory + self.parked

    @property
    def waiting_bytes(self) -> int:
        return self.rows_bytes + sum(run.bytes for run in self.runs.values())

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
        """Unix time of the oldest event that waits."""
        times = [run.oldest for run in self.runs.values()]
        if self.segments_in_memory:
            times.append(next(iter(self.segments_in_memory.values())).created_at)
        return min(times, default=None)

    def oldest_seconds(self) -> float:
        oldest = self.oldest
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def hold(self, segment: Segment) -> None:
        """Count a segment in memory."""
        self.segments_in_memory[segment.id] = segment
        self.in_memory += segment.events
        self.memory_bytes += segment.bytes
        self.rows_bytes += len(segment.data)

    def release(self, segment: Segment) -> None:
        """Count it out of memory."""
        del self.segments_in_memory[segment.id]
        self.in_memory -= segment.events
        self.memory_bytes -= segment.bytes
        self.rows_bytes -= len(segment.data)

    def park(self, segment: Segment) -> None:
        """Add a segment, whose rows memory forgets, to the run that it borders on."""
        run = self.runs.get(segment.source)
        if run is None:
            run = self.runs[segment.source] = Run(
                self.name, segment.source, segment.position - 1, segment.position, 0, 0, 0,
                segment.created_at,
            )  # fmt: skip
        run.after = min(run.after, segment.position - 1)
        run.until = max(run.until, segment.position)
        run.segments += 1
        run.events += segment.events
        run.bytes += len(segment.data)
        run.oldest = min(run.oldest, segment.created_at)
