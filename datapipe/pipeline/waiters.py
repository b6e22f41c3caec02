"""Waiters: POSTs that wait until their events are loaded (`Prefer: wait`).

The rows of such a POST are sealed into segments of their own: its outcome is theirs, whatever they
are loaded with. Each segment is known here from its append to its load.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence

from datapipe.events.segment import SEGMENTS_AT_ONCE, Chunk, Segment
from datapipe.pipeline.lane import Lane

# Lanes for which POSTs may wait, counted for each POST: as many segments as one load takes, so that
# it serves all of them. A waiter takes some 4 KB beside its connection (tracemalloc).
MOST = SEGMENTS_AT_ONCE


class Wait:
    """One POST that waits, for so many seconds at the most.

    Attributes:
        dead: events of it that are dead letters, as far as it is loaded.
        lanes: those it has events in; none: it does not wait.
        left: its segments that are stored and not loaded.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.dead = 0
        self.lanes: frozenset[str] = frozenset()
        self.left: set[str] = set()
        self._until = -math.inf
        self._over: asyncio.Future[None] | None = None

    def begin(self, lanes: Iterable[str]) -> None:
        """Its time begins to run."""
        self.lanes = frozenset(lanes)
        self._until = asyncio.get_running_loop().time() + self.seconds

    async def loaded(self, gone: asyncio.Future[None] | None) -> bool:
        """Whether all is committed: once it is, or it won't be in time; after the append.

        Args: gone: done once nobody listens any more.
        """
        loop = asyncio.get_running_loop()
        if self.left and self._until > loop.time():
            self._over = loop.create_future()
            await asyncio.wait(
                [each for each in (self._over, gone) if each is not None],
                timeout=self._until - loop.time(), return_when=asyncio.FIRST_COMPLETED,
            )  # fmt: skip
        return bool(self.lanes) and not self.left

    def end(self) -> None:
        """It waits no longer, whatever is left."""
        self._until = -math.inf
        self.look()

    def look(self) -> None:
        """All that was left is loaded, or it is to wait no longer."""
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


class Waiters:
    """All POSTs that wait, bounded in number.

    Args: backlog_bytes: of rows in a lane, behind which nobody waits.
    """

    def __init__(self, backlog_bytes: int) -> None:
        self._backlog_bytes = backlog_bytes
        self._waits: set[Wait] = set()
        self._lanes = 0  # of all of them
        self._awaited: dict[str, tuple[Wait, Lane]] = {}  # by segment
        self._stopped = False

    @property
    def segments(self) -> Sequence[str]:
        """Those that are stored, and not loaded as far as is known."""
        return list(self._awaited)

    def enter(self, wait: Wait, chunks: Sequence[Chunk], lanes: Sequence[Lane]) -> None:
        """Before rows are appended: their POST waits, unless it would do so in vain."""
        names = {lane.name for lane in lanes}
        full = self._lanes + len(names) > MOST
        if self._stopped or not wait.seconds or full or any(map(self._in_vain, lanes)):
            return
        wait.begin(names)
        self._waits.add(wait)
        self._lanes += len(names)
        for chunk in chunks:
            chunk.waiter = wait

    def _in_vain(self, lane: Lane) -> bool:
        """Whether the lane can't be loaded now, or more than one load waits there already."""
        return (
            lane.blocked is not None
            or lane.health.up is False
            or lane.waiting.bytes > self._backlog_bytes
        )

    def stored(self, segment: Segment, lane: Lane) -> None:
        """A segment with a waiter is durable; what was stored for nobody is loaded as any other."""
        wait = segment.waiter
        if isinstance(wait, Wait) and wait in self._waits:
            wait.left.add(segment.id)
            self._awaited[segment.id] = wait, lane
            lane.awaited += 1

    def loaded(self, segments: Iterable[str], dead: Mapping[str, int]) -> None:
        """These are committed. Args: dead: how many of a segment's events are dead letters."""
        if not self._awaited:
            return
        for id in segments:
            if (found := self._awaited.pop(id, None)) is not None:
                wait, lane = found
                lane.awaited -= 1
                wait.left.discard(id)
                wait.dead += dead.get(id, 0)
                if not wait.left:
                    wait.look()

    def give_up(self, lane: str) -> None:
        """It can't be loaded: nobody waits for it any longer."""
        for wait in self._waits:
            if lane in wait.lanes:
                wait.end()

    def stop(self) -> None:
        """From now on nobody waits."""
        self._stopped = True
        for wait in self._waits:
            wait.end()

    def leave(self, wait: Wait) -> None:
        """It is answered; perhaps it never entered."""
        if wait not in self._waits:
            return
        self._waits.remove(wait)
        self._lanes -= len(wait.lanes)
        for id in wait.left:
            _, lane = self._awaited.pop(id)
            lane.awaited -= 1
