"""`mirror: none`: segments live in the process's memory alone, by choice."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

from datapipe.events.segment import SEGMENT_OVERHEAD_BYTES, Segment
from datapipe.mirrors import Appended, Membership, Mirror, MirrorPlugin, MirrorState, Traits
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.store import Found, Removal, Run
from datapipe.settings import Settings


class MemoryStore:
    """Promises nothing beyond the life of the process; bounded by `buffer_max_bytes`."""

    reads_ahead = False
    forgets_for_good = True

    def __init__(self, settings: Settings) -> None:
        self.traits = Traits(
            batch_bytes=min(1_048_576, settings.load_trigger_bytes), identity=uuid4().hex,
            recover_interval_s=3600.0, durable=False,
        )  # fmt: skip
        self._positions = itertools.count(1)
        self._bytes = 0
        self._max_bytes = settings.buffer_max_bytes

    async def append(self, segments: Sequence[Segment]) -> Appended:
        for segment in segments:
            segment.source, segment.position = "memory", next(self._positions)
            self._bytes += segment.bytes
        return Appended(segments)

    async def remove(self, removals: Sequence[Removal]) -> None:
        self._bytes -= sum([removal.bytes + SEGMENT_OVERHEAD_BYTES for removal in removals])

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        return []

    async def recover(self, membership: Membership) -> Found:
        return Found()

    async def keep(self, membership: Membership) -> bool:
        return False

    async def release(self) -> None:
        return

    def state(self) -> MirrorState:
        full = "the buffer is full (buffer_max_bytes)" if self._bytes >= self._max_bytes else None
        return MirrorState("none", True, None, self._bytes, self._max_bytes, full)


class MemoryPlugin(MirrorPlugin):
    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[Mirror]:
        yield BufferedMirror(MemoryStore(settings), settings.buffer_max_bytes)

    async def check(self, settings: Settings) -> list[tuple[str, str]]:
        return [("warn", "mirror: none: events live in memory alone until they are loaded")]
