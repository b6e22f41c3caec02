"""Group commit: rows that arrive while an append is under way share the next one.

A lone request waits for one append, a crowd shares one; no timer is needed. There is one group for
each queue of the mirror, so that a sick queue holds up nobody else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from datapipe.errors import MirrorUnavailable
from datapipe.events import Column
from datapipe.mirrors import Mirror
from datapipe.segment import Part, Segment


class Chunk:
    """Rows of one lane from one POST, which go into segments; with a claim they stay whole."""

    __slots__ = ("claim", "columns", "data", "events", "lane")

    def __init__(
        self,
        lane: str,
        columns: tuple[Column, ...],
        data: bytes,
        events: int,
        claim: tuple[str, str, int] | None = None,
    ) -> None:
        self.lane = lane
        self.columns = columns
        self.data = data
        self.events = events
        self.claim = claim  # hash of the key, hash of the body, number of the part


class Group:
    """What waits to be appended to one queue of the mirror."""

    def __init__(
        self,
        mirror: Mirror,
        linger_s: float,
        on_stored: Callable[[Sequence[Segment], float], None],
        on_failed: Callable[[MirrorUnavailable], None],
    ) -> None:
        self._mirror = mirror
        self._linger_s = linger_s
        self._on_stored = on_stored
        self._on_failed = on_failed
        self._chunks: list[Chunk] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._running: set[asyncio.Task[None]] = set()

    def add(self, chunks: Sequence[Chunk]) -> asyncio.Future[None]:
        """Take rows in. The future ends once they are durable, or with MirrorUnavailable."""
        waiter = asyncio.get_running_loop().create_future()
        self._chunks += chunks
        self._waiters.append(waiter)
        if len(self._running) < self._mirror.appends_at_once:
            task = asyncio.create_task(self._commit())
            self._running.add(task)
        return waiter

    async def _commit(self) -> None:
        try:
            while self._chunks:
                if self._linger_s:
                    await asyncio.sleep(self._linger_s)
                chunks, self._chunks = self._chunks, []
                waiters, self._waiters = self._waiters, []
                await self._append(seal(chunks, self._mirror.segment_max_bytes), waiters)
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._running.discard(task)

    async def _append(self, segments: list[Segment], waiters: list[asyncio.Future[None]]) -> None:
        started = time.perf_counter()
        try:
            await self._mirror.append(segments)
        except BaseException as exc:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(exc)
            if not isinstance(exc, MirrorUnavailable):
                raise
            self._on_failed(exc)
            return
        self._on_stored(segments, time.perf_counter() - started)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def settle(self) -> None:
        """Wait until nothing is under way."""
        while self._running:
            await asyncio.wait(self._running)


def seal(chunks: Sequence[Chunk], max_bytes: int) -> list[Segment]:
    """Segments of one lane and at most `max_bytes` rows; a single event or part may be larger."""
    by_lane: dict[tuple[str, tuple[Column, ...]], list[Chunk]] = {}
    for chunk in chunks:
        by_lane.setdefault((chunk.lane, chunk.columns), []).append(chunk)
    segments = []
    for (lane, columns), of_lane in by_lane.items():
        gathered: list[Chunk] = []
        size = 0
        for chunk in _pieces(of_lane, max_bytes):
            if gathered and size + len(chunk.data) > max_bytes:
                segments.append(_segment(lane, columns, gathered))
                gathered, size = [], 0
            gathered.append(chunk)
            size += len(chunk.data)
        segments.append(_segment(lane, columns, gathered))
    return segments


def _pieces(chunks: Sequence[Chunk], max_bytes: int) -> list[Chunk]:
    """Cut chunks without a claim at row ends, so that none is larger than `max_bytes`."""
    pieces = []
    for chunk in chunks:
        if chunk.claim or len(chunk.data) <= max_bytes:
            pieces.append(chunk)
            continue
        start = 0
        while start < len(chunk.data):
            end = chunk.data.rfind(b"\n", start, start + max_bytes) + 1
            if end <= start:  # one row alone is larger
                end = chunk.data.index(b"\n", start) + 1
            data = chunk.data[start:end]
            pieces.append(Chunk(chunk.lane, chunk.columns, data, data.count(b"\n")))
            start = end
    return pieces


def _segment(lane: str, columns: tuple[Column, ...], chunks: Sequence[Chunk]) -> Segment:
    parts, at = [], 0
    for chunk in chunks:
        end = at + len(chunk.data)
        if chunk.claim:
            parts.append(Part(*chunk.claim, at, end, chunk.events))
        at = end
    data = chunks[0].data if len(chunks) == 1 else b"".join(chunk.data for chunk in chunks)
    return Segment(lane, columns, data, sum(chunk.events for chunk in chunks), tuple(parts))
