"""Recovery from IronMQ: what dead processes left, and what our own books don't know.

The reasoning stands at the top of `ironmq`. A recoverer looks (peek takes no lease) before it
reserves, and reserves no further than the last message that it wants; those of the living that it
gets on the way are released. It takes at most 100 messages of a queue at a time, and no more while
many still wait to be loaded: a backlog of any length does not fill memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from datapipe.mirrors import Found, Neighbours
from datapipe.mirrors.ironmq import AGE_LIMIT, LEASE_S, IronMQ
from datapipe.mirrors.ironmq_client import EXPIRATION_S, Message, open_client
from datapipe.mirrors.ironmq_wire import Envelope, Unreadable, envelope_of, pack, unpack
from datapipe.segment import Segment
from datapipe.settings import Settings

_BATCH = 100  # the most that one reserve or peek gives
_LANE = re.compile(r"[a-z][a-z0-9_]{0,47}")

log = structlog.stdlib.get_logger("datapipe.mirrors.ironmq")


class RecoveringIronMQ(IronMQ):
    """The mirror, with the part that looks after other processes' messages."""

    async def recover(self, neighbours: Neighbours) -> Found:
        """See `Mirror.recover`."""
        found = Found()
        if self._leased_bytes() >= self._most:
            found.more = True
            return found
        self.given_up = False
        for queue in await self._noting(self.client.queues(self.prefix)):
            lane = queue.removeprefix(self.prefix)
            if not _LANE.fullmatch(lane) or lane.startswith("datapipe_"):
                continue  # somebody else's
            if neighbours.loads(lane):
                await self._recover_queue(queue, lane, neighbours, found)
            else:
                await self._look_after(queue, lane, neighbours, found)
        return found

    def _leased_bytes(self) -> int:
        """Rows of recovered messages that still wait for their load."""
        return sum(
            h.rows_bytes for held in self.held.values() for h in held.values() if h.reservation
        )

    async def _recover_queue(
        self, queue: str, lane: str, neighbours: Neighbours, found: Found
    ) -> None:
        """Reserve and take what is nobody's in the queue of a lane that we load."""
        if self._leased_bytes() >= self._most:
            found.more = True
            return
        seen = await self._noting(self.client.peek(queue, _BATCH))
        wanted = [self._wants(message, lane, neighbours, found) for message in seen]
        if not any(wanted):
            return
        reach = max(i for i, want in enumerate(wanted) if want) + 1
        now = self.clock()
        taken = await self._noting(self.client.reserve(queue, reach, LEASE_S))
        found.more = found.more or len(seen) == _BATCH
        for message in taken:
            if not self._wants(message, lane, neighbours, found):
                await self.client.release(queue, message)
                continue
            try:
                envelope = envelope_of(message.body)
                if envelope.lane != lane:
                    raise Unreadable(f"it is of the lane {envelope.lane}")
                segment = await asyncio.to_thread(unpack, envelope)
            except Unreadable as exc:
                await self._set_aside(queue, message, str(exc))
                continue
            if segment.id in self.known:  # another copy of one that we hold
                await self.client.delete(queue, [(message.id, message.reservation_id)])
                continue
            self.hold(queue, segment, message, envelope.posted, now + LEASE_S)
            found.segments.append(segment)

    def _wants(self, message: Message, lane: str, neighbours: Neighbours, found: Found) -> bool:
        """Whether a message is nobody's: its sender is dead, or our books don't know it."""
        try:
            envelope = envelope_of(message.body)
        except Unreadable:
            return True  # to set it aside
        if envelope.lane != lane:
            return True  # strayed into the wrong queue: to set it aside
        if envelope.sender == self.process:
            return envelope.segment not in self.known and envelope.segment not in self.appending
        if neighbours.silent(envelope.sender):
            return True
        found.suspects.add(envelope.sender)
        return False

    async def _set_aside(self, queue: str, message: Message, why: str) -> None:
        """Move a message that is damaged or foreign to a queue of its own; none is dropped."""
        aside = f"{queue}-unreadable"
        await self.client.post(aside, message.body)
        await self.client.delete(queue, [(message.id, message.reservation_id)])
        log.error("message unreadable", queue=queue, moved_to=aside, error=why)

    # --- lanes that are not loaded here ---

    async def _look_after(
        self, queue: str, lane: str, neighbours: Neighbours, found: Found
    ) -> None:
        """Show a lane that nobody here can load, and keep its messages from expiring."""
        seen = await self._noting(self.client.peek(queue, _BATCH))
        oldest = _envelope(seen[0]) if seen else None
        if oldest is None or oldest.lane != lane:
            return  # not in our wire form: somebody else's queue
        found.strangers.add(lane)
        limit = self.clock() - EXPIRATION_S * AGE_LIMIT
        old = [m for m in seen if (e := _envelope(m)) is not None and e.posted < limit]
        if old:
            await self._post_anew_all(queue, len(old), limit, neighbours)

    async def _post_anew_all(
        self, queue: str, count: int, limit: float, neighbours: Neighbours
    ) -> None:
        taken = await self._noting(self.client.reserve(queue, count, LEASE_S))
        envelopes = [_envelope(message) for message in taken]
        loaded = await neighbours.loaded([e.segment for e in envelopes if e is not None])
        for message, envelope in zip(taken, envelopes, strict=True):
            if envelope is None or envelope.posted >= limit or envelope.segment in self.known:
                await self.client.release(queue, message)
                continue
            if envelope.segment not in loaded:
                segment: Segment = await asyncio.to_thread(unpack, envelope)
                body = await asyncio.to_thread(pack, segment, envelope.sender, self.clock())
                await self.client.post(queue, body)
            await self.client.delete(queue, [(message.id, message.reservation_id)])


def _envelope(message: Message) -> Envelope | None:
    try:
        return envelope_of(message.body)
    except Unreadable:
        return None


@asynccontextmanager
async def open_ironmq(
    settings: Settings, process: str, clock: Callable[[], float] = time.time
) -> AsyncIterator[RecoveringIronMQ]:
    """Open the mirror; nothing is sent until there is something to do."""
    async with open_client(settings) as client:
        yield RecoveringIronMQ(client, settings, process, clock)
