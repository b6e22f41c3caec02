"""Recovery from IronMQ: what dead processes left, and what is missing in our own books.

Whose a message is, is decided in `mirrors/recovery.py`. A recoverer looks (peek takes no lease)
before it reserves, and reserves no further than the last message that it wants; those of the living
that it gets on the way are released. What it does not see it counts: a queue gives its size, so it
is known that a recoverer that died has messages reserved, or that they lie behind a hundred of the
living, and looks follow each other closely until they can be had. Of each queue it holds a hundred
or two, and no more rows than its share of memory, until they are loaded: a backlog of any length
does not fill memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import SEGMENT_OVERHEAD_BYTES
from datapipe.events.unknown import UNKNOWN
from datapipe.mirrors import Membership
from datapipe.mirrors.ironmq.books import ANEW_S, LEASE_MAX_S, LEASE_S, Books, Held
from datapipe.mirrors.ironmq.client import MESSAGES_AT_ONCE, CallRefused, Client, Message
from datapipe.mirrors.ironmq.upkeep import Upkeep
from datapipe.mirrors.ironmq.wire import Unreadable, envelope_of, rows_bytes, unpacked
from datapipe.mirrors.recovery import STAYS, Fate, Label, fate_of, known_to_ledger
from datapipe.mirrors.store import Found
from datapipe.settings import Settings

# of a queue that may be one of ours; it is without its prefix
LANE = re.compile(rf"{UNKNOWN}|(?!datapipe_)[a-z][a-z0-9_]{{0,47}}")


@dataclass(slots=True)
class Beyond:
    """Messages of a queue that are in no books of ours and that a look did not reach.

    Attributes:
        messages: so many at least: none of those that are being posted.
        visible: some of them may be seen by a later look, once what lies before them has left.
        since: when there were last more of them, or fewer.
    """

    messages: int
    visible: bool
    since: float

    def left_s(self, now: float) -> float:
        """How long until a look will have reached them, if a dead process has them reserved.

        No lease of a datapipe lasts longer: what stays beyond that is reserved by somebody else.
        """
        return max(0.0, self.since + LEASE_MAX_S + LEASE_S - now)


class Orphans:
    """Finds messages that are nobody's and takes them into the books."""

    def __init__(self, client: Client, books: Books, upkeep: Upkeep, settings: Settings) -> None:
        self._client = client
        self._books = books
        self._upkeep = upkeep
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
                self._unfinished.discard(queue)
                lane = queue.removeprefix(self._books.prefix)
                await self._look_at(queue, lane, membership, found)
        except MirrorUnavailable:
            if not found.segments:
                raise
            found.more = True  # those are ours now; the next look shows what is wrong
        self._books.place(found.segments)
        found.unconfirmed = set().union(*self._unconfirmed.values())
        found.more = found.more or bool(self._unfinished)
        now = self._books.clock()
        found.left = any(each.visible or each.left_s(now) for each in self._beyond.values())
        return found

    def left(self) -> tuple[int, float | None]:
        """Messages that a dead process has reserved, and within how many seconds they come.

        What may be visible is not counted: the living have most of that.
        """
        now = self._books.clock()
        left = [
            each
            for each in self._beyond.values()
            if each.messages and not each.visible and each.left_s(now)
        ]
        longest_s = max((each.left_s(now) for each in left), default=None)
        return sum(each.messages for each in left), longest_s

    async def _to_look_at(self) -> list[str]:
        """All queues of lanes, or those that were not done with, as soon as there is room."""
        now = self._books.clock()
        if self._unfinished and 0 <= now - self._looked < LEASE_S:
            return [queue for queue in self._unfinished if self._room(queue) > 0]
        try:
            names = await self._client.queues(self._books.prefix)
        except CallRefused as exc:
            if exc.http_status != 404:
                raise
            names = []  # perhaps nothing was posted yet
        self._thorough, self._books.given_up = self._books.given_up, False
        self._looked = now
        prefix = self._books.prefix
        self._queues = [name for name in names if LANE.fullmatch(name.removeprefix(prefix))]
        for by_queue in (self._unconfirmed, self._beyond):
            for queue in by_queue.keys() - set(self._queues):
                del by_queue[queue]
        return self._queues

    def _room(self, queue: str) -> int:
        """Bytes in memory that recovered segments of this queue may still take."""
        recovered = [held for held in self._books.of_queue(queue) if held.recovered]
        if len(recovered) >= MESSAGES_AT_ONCE:  # their leases may have to be prolonged one by one
            return 0
        taken = sum(held.rows_bytes + SEGMENT_OVERHEAD_BYTES for held in recovered)
        return self._share // max(1, len(self._queues)) - taken

    async def _look_at(self, queue: str, lane: str, membership: Membership, found: Found) -> None:
        """Do with the messages of a queue what is to be done with them."""
        can_load = membership.can_load(lane)
        room = self._room(queue) if can_load else self._share
        if room <= 0:
            self._unfinished.add(queue)
            return
        unconfirmed = self._unconfirmed[queue] = set()

        def fate(message: Message) -> Fate:
            label = self._label(message)
            decided = fate_of(label, lane, self._books, membership)
            if label is not None and decided is Fate.THEIRS:
                unconfirmed.add(label.sender)
            return decided

        async with self._books.leases[queue]:  # no removal meanwhile: what is counted must match
            reached = self._ids(queue)
            size = await self._client.size(queue) or 0 if can_load else 1
            seen: Sequence[Message] = ()
            if size or self._thorough:  # the size may lag behind by a second
                seen = await self._client.peek(queue, MESSAGES_AT_ONCE)
            if not can_load:
                self._beyond.pop(queue, None)
                oldest = self._label(seen[0]) if seen else None
                if oldest is None or oldest.lane != lane:
                    return  # not in our wire form: somebody else's queue
                found.unregistered.add(lane)
            staying = {message.id for message in seen if fate(message) in STAYS}
            ours = self._ids(queue)
            now = self._books.clock()
            renewable: list[Message] = []
            for message in await self._reserve(queue, seen, staying, room):
                reached.add(message.id)
                decided = fate(message)
                lease = message.reservation_id or ""
                if decided is Fate.RENEW:
                    renewable.append(message)
                elif decided is Fate.DELETE:
                    await self._client.delete(queue, [(message.id, lease)])
                    self._books.undeleted.pop(envelope_of(message.body).segment, None)
                elif decided in STAYS:
                    await self._client.release(queue, message.id, lease)
                else:
                    await self._take(queue, lane, message, now, found)
        await self._renew(queue, renewable, membership)
        if can_load:
            # those that we posted meanwhile may be in the size, or not
            posted = len(ours - reached) + len(self._books.appending)
            beyond = size - len(reached | (staying - ours))
            visible = len(seen) == MESSAGES_AT_ONCE and bool(unconfirmed)
            self._note_beyond(queue, beyond, posted, visible)

    def _label(self, message: Message) -> Label | None:
        try:
            said = envelope_of(message.body)
        except Unreadable:
            return None
        old = self._books.clock() - said.posted > ANEW_S
        return Label(message.id, said.lane, said.segment, said.sender, old)

    def _ids(self, queue: str) -> set[str]:
        """Of all messages of a queue that are in our books."""
        return {held.id for held in self._books.of_queue(queue)}

    async def _reserve(
        self, queue: str, seen: Sequence[Message], staying: set[str], room: int
    ) -> list[Message]:
        """Reserve what was seen up to the last one that is not to stay.

        Args: room: bytes of memory that they may take, unless a single one is larger.
        """
        reach = 0
        for number, message in enumerate(seen, 1):
            if message.id not in staying:
                room -= _cost(message)
                if reach and room < 0:
                    self._unfinished.add(queue)
                    break
                reach = number
        if not reach:
            return []
        if len(seen) == MESSAGES_AT_ONCE:
            self._unfinished.add(queue)
        return await self._client.reserve(queue, reach, LEASE_S)

    async def _take(
        self, queue: str, lane: str, message: Message, now: float, found: Found
    ) -> None:
        """Put a message that we reserved into our books, if it can be read."""
        try:
            envelope = envelope_of(message.body)
            if envelope.lane != lane:
                raise Unreadable(f"it is of the event type {envelope.lane}")
            segment = await unpacked(envelope)
        except Unreadable as exc:
            await self._upkeep.quarantine(queue, message, str(exc))
            return
        held = Held.of(message.id, segment, len(message.body), envelope.posted)
        held.recovered = True
        held.lease(message.reservation_id or "", LEASE_S, now)
        self._books.known[segment.id] = held
        found.segments.append(segment)

    async def _renew(self, queue: str, messages: Sequence[Message], membership: Membership) -> None:
        """Post anew what nobody here can load, unless the ledger knows it."""
        segments = {message.id: envelope_of(message.body).segment for message in messages}
        loaded = await known_to_ledger(membership, list(segments.values()))
        for message in messages:
            if segments[message.id] not in loaded:
                await self._upkeep.post_anew(queue, message.body, self._books.clock())
            await self._client.delete(queue, [(message.id, message.reservation_id)])

    def _note_beyond(self, queue: str, messages: int, posted: int, visible: bool) -> None:
        """Remember how many messages a look did not reach, of which so many may be our posts."""
        if messages <= 0:
            self._beyond.pop(queue, None)
            removed = self._books.undeleted
            self._books.undeleted = {id: of for id, of in removed.items() if of != queue}
            return
        messages, before = max(0, messages - posted), self._beyond.get(queue)
        if before is None or (before.messages, before.visible) != (messages, visible):
            self._beyond[queue] = Beyond(messages, visible, self._books.clock())


def _cost(message: Message) -> int:
    """What a message's segment will cost in memory."""
    try:
        return rows_bytes(envelope_of(message.body)) + SEGMENT_OVERHEAD_BYTES
    except Unreadable:
        return 0
