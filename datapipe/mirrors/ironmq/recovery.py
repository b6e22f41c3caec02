"""Recovery from IronMQ: what dead processes left, and what our own books don't know.

The reasoning stands at the top of `ironmq`. A recoverer looks (peek takes no lease) before it
reserves, and reserves no further than the last message that it wants; those of the living that it
gets on the way are released. What it does not see it counts: a queue tells its size, so it is known
that a recoverer that died has messages reserved, or that they lie behind a hundred of the living,
and looks follow each other closely until they can be had. Of each queue it holds a hundred or two,
and no more rows than its share of memory, until they are loaded: a backlog of any length does not
fill memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

import aiohttp

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import SEGMENT_OVERHEAD_BYTES
from datapipe.mirrors import Membership, Mirror, MirrorPlugin, MirrorState
from datapipe.mirrors.buffered import BufferedMirror, Found
from datapipe.mirrors.ironmq.client import CONNECTIONS, Client, Message, Refused
from datapipe.mirrors.ironmq.mirror import (
    ANEW_S,
    BATCH,
    LEASE_MAX_S,
    LEASE_S,
    IronMQ,
    held_of,
    unpacked,
)
from datapipe.mirrors.ironmq.wire import Envelope, Unreadable, envelope_of, rows_bytes
from datapipe.settings import Settings

_LANE = re.compile(r"[a-z][a-z0-9_]{0,47}")


@dataclass(slots=True)
class Beyond:
    """Messages of a queue that are in no books of ours and that a look did not reach.

    Attributes:
        messages: so many at least: none of those that are being posted.
        visible: some of them may be seen by a later look, once what lies before them is gone.
        since: when there were last more of them, or fewer.
    """

    messages: int
    visible: bool
    since: float

    def left_s(self, now: float) -> float:
        """How long until a look will have reached them, if a dead process has them reserved.

        For that long a lease of ours may be; what stays longer is nobody's of us.
        """
        return max(0.0, self.since + LEASE_MAX_S + LEASE_S - now)


class RecoveringIronMQ(IronMQ):
    """The mirror, with the part that looks after other processes' messages."""

    def __init__(
        self, client: Client, settings: Settings, process: str, clock: Callable[[], float]
    ) -> None:
        super().__init__(client, settings, process, clock)
        # a quarter of what the buffer may hold, so that memory has room for what comes in
        self._share = min(settings.load_trigger_bytes, settings.buffer_max_bytes // 4)
        self._queues: list[str] = []  # as of the last look at all of them
        self._looked = 0.0
        self._unfinished: set[str] = set()  # queues that hold more, once this is loaded
        self._unconfirmed: dict[str, set[str]] = {}  # by queue
        self._beyond: dict[str, Beyond] = {}  # by queue
        self._thorough = False  # a message of ours may lie in a queue that says it is empty

    async def recover(self, membership: Membership) -> Found:
        """See `Store.recover`. While there is no room for more, nothing is asked."""
        found = Found()
        try:
            for queue in await self._to_look_at():
                lane = queue.removeprefix(self.prefix)
                self._unfinished.discard(queue)
                if membership.can_load(lane):
                    await self._recover_queue(queue, lane, membership, found)
                else:
                    await self._look_after(queue, lane, membership, found)
        except MirrorUnavailable:
            if not found.segments:
                raise
            found.more = True  # those are ours now; the next look tells what is wrong
        self.place(found.segments)
        found.unconfirmed = set().union(*self._unconfirmed.values())
        found.more = found.more or bool(self._unfinished)
        found.left = any(self._waits_for(each) for each in self._beyond.values())
        return found

    def _waits_for(self, beyond: Beyond) -> bool:
        return beyond.visible or beyond.left_s(self.clock()) > 0

    def state(self) -> MirrorState:
        """See `Mirror.state`. What may be visible is not told: the living have most of that."""
        state, now = super().state(), self.clock()
        for each in self._beyond.values():
            left_s = each.left_s(now)
            if each.messages and left_s and not each.visible:
                left_s = max(left_s, state.left_s or 0.0)
                state = replace(state, left=state.left + each.messages, left_s=left_s)
        return state

    async def _to_look_at(self) -> list[str]:
        """All queues of lanes, or those that were not done with, as soon as there is room."""
        now = self.clock()
        if self._unfinished and 0 <= now - self._looked < LEASE_S:
            return [queue for queue in self._unfinished if self._room(queue) > 0]
        try:
            names = await self._noting(self.client.queues(self.prefix))
        except Refused as exc:
            if exc.status != 404:
                raise
            names = []  # perhaps nothing was posted yet
        self._thorough, self.given_up = self.given_up, False
        self._looked = now
        self._queues = [name for name in names if _is_lane(name.removeprefix(self.prefix))]
        for by_queue in (self._unconfirmed, self._beyond):
            for queue in by_queue.keys() - set(self._queues):
                del by_queue[queue]
        return self._queues

    def _room(self, queue: str) -> int:
        """Bytes in memory that recovered segments of this queue may still take."""
        recovered = [held for held in self.held.get(queue, {}).values() if held.recovered]
        if len(recovered) >= BATCH:  # their leases may have to be prolonged one by one
            return 0
        taken = sum(held.rows_bytes + SEGMENT_OVERHEAD_BYTES for held in recovered)
        return self._share // max(1, len(self._queues)) - taken

    async def _recover_queue(
        self, queue: str, lane: str, membership: Membership, found: Found
    ) -> None:
        """Take what is nobody's in the queue of a lane that we load."""
        room = self._room(queue)
        if room <= 0:
            self._unfinished.add(queue)
            return

        found.unconfirmed = self._unconfirmed[queue] = set()

        def wanted(message: Message) -> bool:
            return self._wants(message, lane, membership, found)

        async with self.leases[queue]:  # no removal meanwhile: what is counted must match
            reached = self._ids(queue)
            size, seen = await self._look(queue)
            others = {message.id for message in seen if not wanted(message)}
            ours = self._ids(queue)
            now = self.clock()
            async for message in self._reserved(queue, seen, wanted, room):
                reached.add(message.id)
                await self._take(queue, lane, message, now, found)
        # those that we posted meanwhile may be in the size, or not
        posted = len(ours - reached) + len(self.appending)
        beyond = size - len(reached | (others - ours))
        self._note_beyond(queue, beyond, posted, len(seen) == BATCH and bool(found.unconfirmed))

    def _ids(self, queue: str) -> set[str]:
        """Of all messages of a queue that are in our books."""
        return {held.id for held in self.held.get(queue, {}).values()}

    async def _look(self, queue: str) -> tuple[int, Sequence[Message]]:
        """How many messages the queue holds, and the oldest of those that nobody has reserved."""
        size = await self._noting(self.client.size(queue)) or 0
        if not size and not self._thorough:  # it may lag behind by a second
            return 0, ()
        return size, await self._noting(self.client.peek(queue, BATCH))

    def _note_beyond(self, queue: str, messages: int, posted: int, visible: bool) -> None:
        """Remember how many messages a look did not reach, of which so many may be our posts."""
        if messages <= 0:
            self._beyond.pop(queue, None)
            self.undeleted.pop(queue, None)
            return
        messages, before = max(0, messages - posted), self._beyond.get(queue)
        if before is None or (before.messages, before.visible) != (messages, visible):
            self._beyond[queue] = Beyond(messages, visible, self.clock())

    async def _reserved(
        self, queue: str, seen: Sequence[Message], wanted: Callable[[Message], bool], room: int
    ) -> AsyncIterator[Message]:
        """Reserve what is wanted of what was seen; what else comes on the way is released.

        Args: room: bytes of memory that they may take, unless a single one is larger.
        """
        reach = 0
        for i, message in enumerate(seen):
            if wanted(message):
                room -= _cost(message)
                if reach and room < 0:
                    self._unfinished.add(queue)
                    break
                reach = i + 1
        if not reach:
            return
        if len(seen) == BATCH:
            self._unfinished.add(queue)
        for message in await self._noting(self.client.reserve(queue, reach, LEASE_S)):
            assert message.reservation_id is not None
            if wanted(message):
                yield message
            else:
                lease = message.reservation_id
                await self._noting(self.client.release(queue, message.id, lease))

    def _wants(self, message: Message, lane: str, membership: Membership, found: Found) -> bool:
        """Whether a message is nobody's, or a copy: then we are the one to take it away."""
        envelope = _envelope(message)
        if envelope is None or envelope.lane != lane:
            return True  # unreadable, or strayed into the wrong queue: to set it aside
        if envelope.segment in self.appending:
            return False
        if (mine := self.known.get(envelope.segment)) is not None:
            return mine.id != message.id  # a copy
        if envelope.segment in self.undeleted.get(self.queue_of(lane), ()):
            return True
        if envelope.sender == self.process or membership.is_dead(envelope.sender):
            return True
        found.unconfirmed.add(envelope.sender)
        return False

    async def _take(
        self, queue: str, lane: str, message: Message, now: float, found: Found
    ) -> None:
        """Put a message that we reserved into our books."""
        try:
            envelope = envelope_of(message.body)
            if envelope.lane != lane:
                raise Unreadable(f"it is of the lane {envelope.lane}")
            segment = await unpacked(envelope)
        except Unreadable as exc:
            await self.set_aside(queue, message, str(exc))
            return
        assert message.reservation_id is not None
        undeleted = self.undeleted.get(queue, set())
        if segment.id in self.known or segment.id in undeleted:
            await self._noting(self.client.delete(queue, [(message.id, message.reservation_id)]))
            undeleted.discard(segment.id)
            return
        held = held_of(message.id, segment, len(message.body), envelope.posted)
        held.recovered = True
        held.lease(message.reservation_id, LEASE_S, now)
        self.known[segment.id] = held
        found.segments.append(segment)

    # --- lanes that are not loaded here, or not now ---

    async def _look_after(
        self, queue: str, lane: str, membership: Membership, found: Found
    ) -> None:
        """Show a lane that nobody here can load, and keep its messages from expiring."""
        self._beyond.pop(queue, None)
        found.unconfirmed = self._unconfirmed[queue] = set()
        seen = await self._noting(self.client.peek(queue, BATCH))
        oldest = _envelope(seen[0]) if seen else None
        if oldest is None or oldest.lane != lane:
            return  # not in our wire form: somebody else's queue
        found.unregistered.add(lane)

        def old(message: Message) -> bool:
            return self._is_old(message) and self._wants(message, lane, membership, found)

        taken = [message async for message in self._reserved(queue, seen, old, self._share)]
        ids = {message.id: e.segment for message in taken if (e := _envelope(message)) is not None}
        loaded = await self.ledger_knows(membership, list(ids.values()))
        for message in taken:
            if ids[message.id] not in loaded:
                await self.repost(queue, message.body, self.clock())
            await self._noting(self.client.delete(queue, [(message.id, message.reservation_id)]))

    def _is_old(self, message: Message) -> bool:
        envelope = _envelope(message)
        if envelope is None or envelope.segment in self.known:  # `keep` looks after those
            return False
        return self.clock() - envelope.posted > ANEW_S


def _is_lane(name: str) -> bool:
    """Whether a queue may be one of ours, going by its name."""
    return _LANE.fullmatch(name) is not None and not name.startswith("datapipe_")


def _cost(message: Message) -> int:
    """What a message's segment will cost in memory."""
    envelope = _envelope(message)
    return 0 if envelope is None else rows_bytes(envelope) + SEGMENT_OVERHEAD_BYTES


def _envelope(message: Message) -> Envelope | None:
    try:
        return envelope_of(message.body)
    except Unreadable:
        return None


@asynccontextmanager
async def open_store(
    settings: Settings, process: str, clock: Callable[[], float] = time.time
) -> AsyncIterator[RecoveringIronMQ]:
    """The store, with so many connections; nothing is sent until there is something to do."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
    ) as session:
        store = RecoveringIronMQ(Client(session, settings), settings, process, clock)
        try:
            yield store
        finally:
            await store.release()


@asynccontextmanager
async def open_ironmq(
    settings: Settings, process: str, clock: Callable[[], float] = time.time
) -> AsyncIterator[BufferedMirror]:
    """Open the mirror."""
    async with open_store(settings, process, clock) as store:
        yield BufferedMirror(store, settings.buffer_max_bytes)


class IronMQPlugin(MirrorPlugin):
    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Mirror]:
        return open_ironmq(settings, process)

    async def check(self, settings: Settings) -> list[tuple[str, str]]:
        async with open_store(settings, "check") as store:
            return await store.check()
