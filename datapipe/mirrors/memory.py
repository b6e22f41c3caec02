"""`mirror: none`: segments live in the process's memory alone, by choice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from uuid import uuid4

from datapipe.events.segment import Segment
from datapipe.mirrors import Found, MirrorState, Neighbours, Run
from datapipe.settings import Settings


class MemoryMirror:
    """Promises nothing beyond the life of the process; the buffer's bound is its bound."""

    parks = False
    appends_at_once = 1
    gather_s = 0.0
    forgets_for_good = True
    reads_ahead = False  # nothing is parked
    recover_interval_s = 3600.0
    given_up = False

    def __init__(self, settings: Settings) -> None:
        self.segment_max_bytes = min(1_048_576, settings.load_trigger_bytes)
        self.identity = uuid4().hex
        self._positions = itertools.count(1)
        self._sizes: dict[str, int] = {}
        self._max_bytes = settings.buffer_max_bytes

    def queue_of(self, lane: str) -> str:
        return ""

    async def append(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        for segment in segments:
            segment.source, segment.position = "memory", next(self._positions)
            self._sizes[segment.id] = segment.bytes
        return segments

    async def remove(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._sizes.pop(segment.id, None)

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        return []

    def drained(self) -> list[str]:
        return []

    async def forgotten(self, source: str) -> None:
        return

    async def recover(self, neighbours: Neighbours) -> Found:
        return Found()

    async def keep(self, neighbours: Neighbours) -> None:
        return

    async def release_all(self) -> None:
        return

    def state(self) -> MirrorState:
        size = sum(self._sizes.values())
        full = "the buffer is full (buffer_max_bytes)" if size >= self._max_bytes else None
        return MirrorState("none", True, None, size, self._max_bytes, full)
