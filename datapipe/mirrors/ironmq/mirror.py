"""IronMQ as the mirror: one queue per lane, one message per segment.

A message is anyone's: what is reserved can't be filtered, and an answer may be lost after its
effect. So this is how nothing is lost and nothing doubled:

- A message names its segment and its sender. A post is repeated with the same segment id, so a
  copy that was stored without an answer is the same segment to the ledger, which skips it.
- While its sender lives, a message is the sender's: it is loaded from the sender's memory, and
  deleted by id after the commit. Nobody reserves it, but on the way to another, to release it.
- A sender that is silent (its heartbeat in the database stands still) is taken to be dead, and
  whoever sees it first reserves its messages, loads and deletes them. If it lives after all, both
  load, and the ledger lets one of them through; to the other they are
  duplicates, so its books still balance.
- A message of ours that our books don't know is recovered the same way: its append was given up
  on, yet stored; or it is a second copy; or somebody had it reserved when we deleted it.
- A message whose form is not ours is moved to `<queue>-unreadable`, never dropped.

Leases only keep recoverers out of each other's way; one that runs out costs work, not events. So
they are short, for a recoverer that is killed must not hold up what it had reserved. Each time one
is prolonged it is doubled, for prolonging costs requests, up to two minutes; then it runs out, and
the message is anyone's again. A stop gives back what is reserved. Each touch makes the reservation
id before it worthless, so whatever uses one has its queue's lock. Messages live 30 days at the
most; at 80 % of that one is posted anew, with the same segment id, and the old one deleted.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import structlog

from datapipe.errors import LaneBlocked, MirrorFull, MirrorUnavailable, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.health import Health
from datapipe.mirrors import Appended, Membership, MirrorState, Traits
from datapipe.mirrors.buffered import Removal, Run
from datapipe.mirrors.ironmq.client import (
    DELETE_MAX_IDS,
    EXPIRATION_S,
    Client,
    Message,
    Refused,
    encode_post,
)
from datapipe.mirrors.ironmq.wire import (
    Envelope,
    Unreadable,
    envelope_of,
    pack,
    posted_anew,
    unpack,
)
from datapipe.settings import Settings

SOURCE = "ironmq"  # by this the ledger knows that a segment may come back for 31 days
RECOVER_INTERVAL_S = 1800.0
LEASE_S = 30  # the shortest there is
LEASE_MAX_S = 120  # so long, and a look later, what a dead recoverer had is anyone's
ANEW_S = EXPIRATION_S * 0.8  # the age at which a message is posted anew
ANEW_AGAIN_S = 21_600  # until one that was refused is tried again
BATCH = 100  # the most messages that one reserve or peek gives
_HELD_BYTES = 512  # what a message costs in memory though its rows are parked; measured, rounded up
_HELD_LEAST = 100_000  # messages that may be listed, however small the buffer
_PACK_INLINE_BYTES = 4_096  # more is packed in a thread
_RELEASE_S = 1.0  # a stop does not wait longer
_APPENDS = 16  # under way at once, per lane
_CROWDED = 2_000  # one fewer for so many messages
_FULL = "no room for more in IronMQ (ironmq_max_bytes)"
_TOO_MANY = "no room for more messages in IronMQ: memory can't list them (buffer_max_bytes)"

_T = TypeVar("_T")
log = structlog.stdlib.get_logger("datapipe.mirrors.ironmq.mirror")


@dataclass(slots=True)
class Held:
    """A message in our books: posted by us, or recovered under a lease."""

    id: str
    segment: str
    events: int
    bytes: int
    rows_bytes: int
    created: float
    anew_at: float
    recovered: bool = False
    reservation: str | None = None
    lease_s: int = LEASE_S
    lease_until: float = 0.0

    def lease(self, reservation: str, lease_s: int, now: float) -> None:
        self.reservation, self.lease_s, self.lease_until = reservation, lease_s, now + lease_s

    def entry(self, now: float) -> tuple[str, str | None]:
        """As a delete wants it: a lease that has run out is none."""
        return self.id, self.reservation if now < self.lease_until else None


def held_of(id: str, segment: Segment, size: int, posted: float) -> Held:
    """A message that bears this segment."""
    return Held(
        id, segment.id, segment.events, size, len(segment.data), segment.created_at,
        posted + ANEW_S,
    )  # fmt: skip


async def unpacked(envelope: Envelope) -> Segment:
    """The segment of a message. Raises: Unreadable."""
    if len(envelope.rows) <= _PACK_INLINE_BYTES:
        return unpack(envelope)
    return await asyncio.to_thread(unpack, envelope)


class IronMQ:
    """The store; recovery of other processes' messages is in `recovery`."""

    forgets_for_good = False  # a copy may come back until it expires
    reads_ahead = False  # a look shows the oldest messages, those on their way out too

    def __init__(
        self, client: Client, settings: Settings, process: str, clock: Callable[[], float]
    ) -> None:
        self.client = client
        self.process = process
        self.clock = clock
        self.prefix = settings.ironmq_queue_prefix
        self.appending: set[str] = set()  # segments whose post is under way
        self.given_up = False  # a post of ours may be stored though it failed
        self.held: dict[str, dict[int, Held]] = {}  # by queue and position
        self.known: dict[str, Held] = {}  # by segment
        self.undeleted: dict[str, set[str]] = {}  # segments done with; somebody has their message
        # by queue: for all that uses or makes reservation ids of what is held
        self.leases: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._max_bytes = settings.ironmq_max_bytes
        self._most_held = max(_HELD_LEAST, settings.buffer_max_bytes // _HELD_BYTES)
        self._bytes = 0
        self._positions = itertools.count(1)
        self._made: dict[str, asyncio.Task[None]] = {}  # queues, by name
        self._health = Health(up=True)
        self._timeout_s = settings.mirror_timeout
        self._latency_s = 0.05
        self._ratio = 2.0  # bytes of rows for each byte of a request
        self._most = settings.load_trigger_bytes

    @property
    def traits(self) -> Traits:
        """As learned so far."""
        fills_a_message = int(self.client.room(self.prefix) * self._ratio * 0.94)
        return Traits(
            batch_bytes=max(1, min(self._most, fills_a_message)),
            identity=self.process,
            recover_interval_s=RECOVER_INTERVAL_S,
            # fewer while many messages wait to be loaded, so that more rows share one
            appends_at_once=max(1, _APPENDS - len(self.known) // _CROWDED),
            linger_s=min(self._latency_s / 32, 0.05),
            queue_per_lane=True,
        )

    def queue_of(self, lane: str) -> str:
        return self.prefix + lane

    # --- append ---

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Store.append`. What does not fit into one message is cut."""
        if (why := self.state().full) is not None:
            return Appended((), MirrorFull(why))
        began = time.perf_counter()
        pieces: list[list[Segment]] = [[] for _ in segments]
        posts = map(self._append, segments, pieces)
        try:
            async with asyncio.timeout(self._timeout_s):
                outcomes = await asyncio.gather(*posts, return_exceptions=True)
            failed = next((each for each in outcomes if each is not None), None)
        except TimeoutError:
            failed = MirrorUnavailable(f"IronMQ does not answer within {self._timeout_s:g} s")
        stored = [piece for into in pieces for piece in into]
        self.given_up |= failed is not None and not isinstance(failed, MirrorFull)
        if failed is not None and not isinstance(failed, MirrorUnavailable):
            for piece in stored:  # nobody will book them: to be recovered
                del self.known[piece.id]
            raise failed
        self.place(stored)
        if failed is None:
            self._health.works(time.perf_counter())
        elif not isinstance(failed, MirrorFull):
            self._health.fails(began, failed.detail)
        return Appended(stored, failed)

    async def _append(self, segment: Segment, stored: list[Segment]) -> None:
        """Post a segment, or the pieces that it takes; what is stored goes into the list."""
        queue, posted = self.queue_of(segment.lane), self.clock()
        if len(segment.data) <= _PACK_INLINE_BYTES:
            content = self._pack(segment, posted)
        else:
            content = await asyncio.to_thread(self._pack, segment, posted)
        if len(content) > self.client.room(queue):
            await self._append_halves(segment, stored, self.client.room(queue) / len(content))
            return
        if len(segment.data) > _PACK_INLINE_BYTES:
            self._ratio = max(0.1, min(len(segment.data) / len(content), self._ratio * 1.1))
        self.appending.add(segment.id)
        try:
            await self._make(queue)
            started = time.perf_counter()
            id = await self.client.post(queue, content)
        finally:
            self.appending.discard(segment.id)
        self._latency_s += (time.perf_counter() - started - self._latency_s) / 8
        self.known[segment.id] = held_of(id, segment, len(content), posted)
        stored.append(segment)

    async def _make(self, queue: str) -> None:
        """Make the queue, once; those that come meanwhile wait for the one call."""
        made = self._made.get(queue)
        if made is None or (made.done() and (made.cancelled() or made.exception())):
            made = self._made[queue] = asyncio.create_task(self.client.create_queue(queue))
        await asyncio.shield(made)

    def _pack(self, segment: Segment, posted: float) -> bytes:
        return encode_post(pack(segment, self.process, posted))

    async def _append_halves(self, segment: Segment, stored: list[Segment], fits: float) -> None:
        self._ratio *= 0.9
        first, rest = segment.cut(int(len(segment.data) * fits * 0.9))
        if rest is None:
            raise MirrorFull("an event, or a part of a POST with a key, is too large for IronMQ")
        await self._append(first, stored)
        await self._append(rest, stored)

    def place(self, segments: Sequence[Segment]) -> None:
        """Give known segments their positions, at the moment when the buffer gets them."""
        for segment in segments:
            queue, held = self.queue_of(segment.lane), self.known[segment.id]
            segment.source, segment.position = SOURCE, next(self._positions)
            self.held.setdefault(queue, {})[segment.position] = held
            self._bytes += held.bytes

    def _forget(self, queue: str, position: int) -> None:
        held = self.held[queue].pop(position, None)
        if held is not None:
            self.known.pop(held.segment, None)
            self._bytes -= held.bytes

    # --- read, remove ---

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """See `Store.read`. A look at the queue gives most of them, the others are fetched."""
        queue = self.queue_of(run.lane)
        wanted: list[tuple[int, Held]] = []
        size = 0
        for position, held in self.held.get(queue, {}).items():
            if run.after < position <= run.until:
                if wanted and (size + held.rows_bytes > max_bytes or len(wanted) == BATCH):
                    break
                wanted.append((position, held))
                size += held.rows_bytes
        seen: dict[str, Message] = {}
        if len(wanted) > 1:  # those that wait longest come first, and these are they
            peeked = await self._noting(self.client.peek(queue, BATCH))
            seen = {message.id: message for message in peeked}
        return list(
            await asyncio.gather(
                *(self._fetch(run, position, held, seen) for position, held in wanted)
            )
        )

    async def _fetch(
        self, run: Run, position: int, held: Held, seen: dict[str, Message]
    ) -> Segment:
        queue = self.queue_of(run.lane)
        message = seen.get(held.id)
        if message is None:
            if held.reservation:  # not said whether a reserved message can be read by its id
                async with self.leases[queue]:
                    await self._release(queue, held)
            asked = None
            while message is None and asked != held.id:  # it may have been posted anew meanwhile
                asked = held.id
                message = await self._noting(self.client.get(queue, asked))
        if message is not None:
            try:
                segment = await unpacked(envelope_of(message.body))
            except Unreadable as exc:
                await self.set_aside(queue, message, str(exc))
            else:
                segment.source, segment.position = SOURCE, position
                return segment
        segment = Segment(
            run.lane, (), b"", held.events, id=held.segment, created_at=held.created,
            source=SOURCE, position=position,
        )  # fmt: skip
        segment.gone = True  # another process may have loaded it: the ledger will tell
        return segment

    async def set_aside(self, queue: str, message: Message, why: str) -> None:
        """Move a message that is damaged or foreign to a queue of its own; none is dropped."""
        aside = f"{queue}-unreadable"
        try:
            await self._noting(self._make(aside))
            await self._noting(self.client.post(aside, encode_post(message.body)))
        except Refused as exc:  # somebody with a larger plan sent it
            log.error("message unreadable", queue=queue, error=f"{why}; left: {exc.detail}")
            return
        await self._noting(self.client.delete(queue, [(message.id, message.reservation_id)]))
        log.error("message unreadable", queue=queue, moved_to=aside, error=why)

    async def remove(self, removals: Sequence[Removal]) -> None:
        """See `Store.remove`."""
        by_queue: dict[str, list[Removal]] = {}
        for removal in removals:
            queue = self.queue_of(removal.lane)
            if removal.position in self.held.get(queue, {}):
                by_queue.setdefault(queue, []).append(removal)
        for queue, of_queue in by_queue.items():
            for at in range(0, len(of_queue), DELETE_MAX_IDS):
                async with self.leases[queue]:
                    await self._remove(queue, of_queue[at : at + DELETE_MAX_IDS])

    async def _remove(self, queue: str, segments: Sequence[Removal]) -> None:
        """Delete up to a hundred messages; one that somebody has reserved is deleted by a look."""
        held, now = self.held[queue], self.clock()
        segments = [each for each in segments if each.position in held]
        for lost in [each for each in segments if each.gone]:  # if it comes back, it is recovered
            self._forget(queue, lost.position)
            self.given_up = True
        segments = [each for each in segments if not each.gone]
        if not segments:
            return
        entries = {each.id: held[each.position].entry(now) for each in segments}
        refused = await self._noting(self.client.delete(queue, list(entries.values())))
        for segment in segments:
            if entries[segment.id][0] in refused:
                self.undeleted.setdefault(queue, set()).add(segment.id)
                self.given_up = True
            self._forget(queue, segment.position)

    # --- keep ---

    async def keep(self, membership: Membership) -> bool:
        """See `Store.keep`: prolong leases, post anew what is close to its expiration."""
        for queue, by_position in list(self.held.items()):
            old: list[Held] = []
            for held in list(by_position.values()):
                if self._half_over(held):
                    async with self.leases[queue]:
                        await self._prolong(queue, held)
                if self.clock() > held.anew_at:
                    old.append(held)
            loaded = await self.ledger_knows(membership, [held.segment for held in old])
            for held in old:
                if held.segment in loaded:
                    held.anew_at = math.inf  # what is left to do here is to book a duplicate
                else:
                    async with self.leases[queue]:
                        await self._try_to_post_anew(queue, held)
        return self.given_up

    async def _try_to_post_anew(self, queue: str, held: Held) -> None:
        """One that is refused must not keep the others from it."""
        try:
            await self._post_anew(queue, held)
        except Refused as exc:
            if exc.status == 401:
                raise
            held.anew_at = self.clock() + ANEW_AGAIN_S
            log.error("message not posted anew", queue=queue, error=exc.detail)

    def _holds(self, held: Held) -> bool:
        """Whether it was not removed meanwhile."""
        return self.known.get(held.segment) is held

    def _half_over(self, held: Held) -> bool:
        """Whether a lease is to be prolonged."""
        if held.reservation is None or held.lease_s >= LEASE_MAX_S:
            return False
        return held.lease_until - self.clock() < held.lease_s / 2 and self._holds(held)

    async def _prolong(self, queue: str, held: Held) -> None:
        if not self._half_over(held):  # it was removed, or released, meanwhile
            return
        assert held.reservation is not None
        now, lease_s = self.clock(), min(2 * held.lease_s, LEASE_MAX_S)
        try:
            reservation = await self._noting(
                self.client.touch(queue, held.id, held.reservation, lease_s)
            )
        except Refused as exc:
            if exc.status not in (403, 404):
                raise
            held.reservation = None  # lost: the message is anyone's again, and the ledger decides
        else:
            held.lease(reservation, lease_s, now)

    async def _release(self, queue: str, held: Held) -> None:
        """End a lease of ours: the message is anyone's, and in our books still."""
        if held.reservation is not None:
            await self._noting(self.client.release(queue, held.id, held.reservation))
            held.reservation = None

    async def _release_queue(self, queue: str) -> None:
        async with self.leases[queue]:
            leased = [held for held in self.held[queue].values() if held.reservation is not None]
            releases = [self._release(queue, held) for held in leased]
            await asyncio.gather(*releases, return_exceptions=True)

    async def release(self) -> None:
        """See `Store.release`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                await asyncio.gather(*map(self._release_queue, list(self.held)))

    async def _post_anew(self, queue: str, held: Held) -> None:
        if not self._holds(held):
            return
        message = await self._noting(self.client.get(queue, held.id))
        if message is None:
            held.anew_at = math.inf
            return
        posted = self.clock()
        try:
            new = await self.repost(queue, message.body, posted)
        except Unreadable as exc:
            held.anew_at = math.inf
            log.error("message unreadable", queue=queue, error=str(exc))
            return
        old = held.entry(posted)
        held.id, held.anew_at, held.reservation = new, posted + ANEW_S, None
        await self._noting(self.client.delete(queue, [old]))

    async def repost(self, queue: str, body: str, posted: float) -> str:
        """Post a message of ours once more, as of now; its new id."""
        envelope = envelope_of(body)
        content = encode_post(posted_anew(envelope, posted))
        self.appending.add(envelope.segment)
        try:
            return await self._noting(self.client.post(queue, content))
        finally:
            self.appending.discard(envelope.segment)

    @staticmethod
    async def ledger_knows(membership: Membership, segments: Sequence[str]) -> set[str]:
        """Which of them are loaded, as far as the database tells: without it, none."""
        if not segments:
            return set()
        try:
            return await membership.loaded(segments)
        except (SinkUnavailable, LaneBlocked):
            return set()  # better twice in the queue, for the ledger to skip, than expired

    async def _noting(self, call: Awaitable[_T]) -> _T:
        """Await a call, and note whether IronMQ works."""
        began = time.perf_counter()
        try:
            result = await call
        except MirrorUnavailable as exc:
            if not isinstance(exc, Refused) or exc.status == 401:
                self._health.fails(began, exc.detail)
            raise
        self._health.works(time.perf_counter())  # its answer is of now
        return result

    # --- for the page ---

    def state(self) -> MirrorState:
        full = _FULL if self._bytes >= self._max_bytes else None
        if len(self.known) >= self._most_held:
            full = full or _TOO_MANY
        return MirrorState(
            "ironmq", bool(self._health.up), self._health.error, self._bytes, self._max_bytes, full,
            self.client.calls, EXPIRATION_S,
        )  # fmt: skip

    async def check(self) -> list[tuple[str, str]]:
        """See `Mirror.check`."""
        try:
            queues = await self.client.queues(self.prefix)
            sizes = [(queue, await self.client.size(queue)) for queue in queues]
        except Refused as exc:  # 404 may be said of a project in which no queue was made yet
            return [("away" if exc.status == 404 else "fail", f"ironmq: {exc.detail}")]
        except MirrorUnavailable as exc:
            return [("away", f"ironmq: {exc.detail}")]
        found = [("ok", f"ironmq: the credentials work, {len(queues)} queues")]
        return found + [
            ("ok", f"ironmq queue {queue}: {size} messages")
            for queue, size in sizes
            if size is not None
        ]
