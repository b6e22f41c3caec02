"""Group commit: rows that arrive while an append is under way share the next one.

A lone request waits for one append, a crowd shares one. There is one group for each queue of the
mirror, so that a sick queue holds up nobody else. A local mirror needs no timer; a remote one,
where each append costs money and a round trip, gathers for a small part of that round trip first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Chunk, Part, Segment
from datapipe.events.types import Column
from datapipe.mirrors import Mirror

# A crowd is spread over so many appends, for one to be under way while the next is gathered.
_SPREAD, _CROWD = 4, 32
# Turns of the event loop after an append: those that waited for it are answered, their answers go
# out, the next requests come in, and are gathered. Without them one half of a crowd waits while the
# other half is appended, in twice as many appends: with 16 connections 16,600 events a second
# instead of 20,800, with 64 33,700 instead of 35,500.
_TURNS = 4
_NO_ANSWER = "the mirror does not answer (mirror_timeout)"


class Group:
    """What waits to be appended to one queue of the mirror."""

    def __init__(
        self,
        mirror: Mirror,
        linger_s: float,
        timeout_s: float,
        on_stored: Callable[[Sequence[Segment], float], None],
        on_failed: Callable[[MirrorUnavailable, float], None],
    ) -> None:
        self._mirror = mirror
        self._linger_s = linger_s
        self._timeout_s = timeout_s
        self._hung: asyncio.Future[Sequence[Segment]] | None = None
        self._on_stored = on_stored
        self._on_failed = on_failed
        self._waiting: dict[asyncio.Future[None], Sequence[Chunk]] = {}
        self._bytes = 0
        self._under_way = 0  # requests whose append has begun
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, chunks: Sequence[Chunk]) -> asyncio.Future[None]:
        """Take rows in. The future ends once they are durable, or with MirrorUnavailable.

        While an append hangs that is at once: more must not pile up behind it. It is never raised
        here, because the rows of other lanes may be under way by then.
        """
        waiter = asyncio.get_running_loop().create_future()
        if self._hung is not None and not self._hung.done():
            waiter.set_exception(MirrorUnavailable(_NO_ANSWER))
            return waiter
        self._waiting[waiter] = chunks
        for chunk in chunks:
            self._bytes += len(chunk.data)
        self._schedule()
        return waiter

    def _delay_s(self) -> float:
        """How long to gather before an append: no longer than until one is full.

        Nor, unless it is to linger, than until there is the share of a crowd.
        """
        if self._bytes >= self._mirror.segment_max_bytes:
            return 0.0
        crowd = max(len(self._waiting) + self._under_way, _CROWD)
        if not self._linger_s and len(self._waiting) * _SPREAD >= crowd:
            return 0.0
        return max(self._linger_s, self._mirror.gather_s)

    def _schedule(self) -> None:
        if not self._waiting or len(self._running) >= self._mirror.appends_at_once:
            return
        delay_s = self._delay_s()
        if delay_s == 0.0:
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._start)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        task = asyncio.create_task(self._commit())
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._schedule()

    async def _commit(self) -> None:
        while self._waiting:
            taken, self._waiting, self._bytes = self._waiting, {}, 0
            chunks = [chunk for of_one in taken.values() for chunk in of_one]
            self._under_way += len(taken)
            try:
                await self._append(seal(chunks, self._mirror.segment_max_bytes), taken)
            finally:
                self._under_way -= len(taken)
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            if self._delay_s():
                return

    async def _append(
        self, segments: Sequence[Segment], waiters: Iterable[asyncio.Future[None]]
    ) -> None:
        started = time.perf_counter()
        append = asyncio.ensure_future(self._mirror.append(segments))
        try:
            async with asyncio.timeout(self._timeout_s):
                stored = await asyncio.shield(append)
        except TimeoutError:
            self._give_up(append, started)
            _fail(waiters, MirrorUnavailable(_NO_ANSWER))
        except BaseException as exc:
            _fail(waiters, exc)
            if not isinstance(exc, MirrorUnavailable):
                raise
            if exc.stored:  # unanswered, yet they will be loaded: into the books with them
                self._on_stored(exc.stored, time.perf_counter() - started)
            self._on_failed(exc, time.perf_counter() - started)
        else:
            self._on_stored(stored, time.perf_counter() - started)
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _give_up(self, append: asyncio.Future[Sequence[Segment]], started: float) -> None:
        """A disk that does not even say no: refuse all until it does; book what comes late."""

        def ended(append: asyncio.Future[Sequence[Segment]]) -> None:
            if not append.cancelled() and append.exception() is None:
                self._on_stored(append.result(), time.perf_counter() - started)

        self._hung = append
        append.add_done_callback(ended)
        self._on_failed(MirrorUnavailable(_NO_ANSWER), time.perf_counter() - started)
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        _fail(waiting, MirrorUnavailable(_NO_ANSWER))

    async def settle(self) -> None:
        """Append what waits, without lingering, and wait until nothing is under way."""
        while self._waiting or self._running:
            if self._timer is not None:
                self._start()
            await asyncio.wait(self._running)


def _fail(waiters: Iterable[asyncio.Future[None]], exc: BaseException) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(exc)


def seal(chunks: Sequence[Chunk], max_bytes: int) -> list[Segment]:
    """Segments of one lane and at most `max_bytes` rows; a single event or part may be larger."""
    by_lane: dict[tuple[str, tuple[Column, ...]], list[Chunk]] = {}
    for chunk in chunks:
        by_lane.setdefault((chunk.lane, chunk.columns), []).append(chunk)
    segments = []
    for (lane, columns), of_lane in by_lane.items():
        if sum([len(chunk.data) for chunk in of_lane]) <= max_bytes:
            segments.append(_segment(lane, columns, of_lane))
            continue
        gathered: list[Chunk] = []
        room = max_bytes
        for chunk in of_lane:
            rest: Chunk | None = chunk
            while rest is not None:
                piece, rest = _fitting(rest, room, max_bytes)
                if len(piece.data) > room and gathered:
                    segments.append(_segment(lane, columns, gathered))
                    gathered, room = [], max_bytes
                gathered.append(piece)
                room -= len(piece.data)
        segments.append(_segment(lane, columns, gathered))
    return segments


def _fitting(chunk: Chunk, room: int, max_bytes: int) -> tuple[Chunk, Chunk | None]:
    """The rows of a chunk that fill the room, and the rest; whole where it may not be cut."""
    size = len(chunk.data)
    if size <= room or chunk.claim or (size <= max_bytes and room < max_bytes // 8):
        return chunk, None
    cut = chunk.data.rfind(b"\n", 0, max(room, 0)) + 1
    if cut == 0:  # not even one row fits: into a segment of its own start
        cut = chunk.data.rfind(b"\n", 0, max_bytes) + 1 or chunk.data.index(b"\n") + 1
    if cut == size:
        return chunk, None
    first = chunk.data[:cut]
    events = first.count(b"\n")
    return (
        Chunk(chunk.lane, chunk.columns, first, events),
        Chunk(chunk.lane, chunk.columns, chunk.data[cut:], chunk.events - events),
    )


def _segment(lane: str, columns: tuple[Column, ...], chunks: Sequence[Chunk]) -> Segment:
    parts, at = [], 0
    for chunk in chunks:
        end = at + len(chunk.data)
        if chunk.claim:
            parts.append(Part(*chunk.claim, at, end, chunk.events))
        at = end
    data = chunks[0].data if len(chunks) == 1 else b"".join([chunk.data for chunk in chunks])
    return Segment(lane, columns, data, sum([chunk.events for chunk in chunks]), tuple(parts))
