"""IronMQ as the mirror: one queue per lane, one message per segment.

Here are the messages of this process: they are posted, read back, deleted. `books` lists them,
`upkeep` keeps them from being lost, `orphans` finds those of dead processes; whose a message is,
and why nothing is lost or doubled, stands in `mirrors/recovery.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp

from datapipe.errors import MirrorFull, MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors import (
    Appended,
    Membership,
    Mirror,
    MirrorPlugin,
    MirrorState,
    Traits,
    unregistered,
)
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.ironmq.books import HELD_BYTES, SOURCE, Books, Held
from datapipe.mirrors.ironmq.client import (
    CONNECTIONS,
    DELETE_MAX_IDS,
    EXPIRATION_S,
    MESSAGES_AT_ONCE,
    CallRefused,
    Client,
    Message,
    encode_post,
)
from datapipe.mirrors.ironmq.orphans import LANE, Orphans
from datapipe.mirrors.ironmq.upkeep import Upkeep
from datapipe.mirrors.ironmq.wire import INLINE_BYTES, Unreadable, envelope_of, pack, unpacked
from datapipe.mirrors.store import Found, Removal, Run
from datapipe.settings import Settings

RECOVER_INTERVAL_S = 1800.0
_HELD_LEAST = 100_000  # messages that may be listed, however small the buffer
_APPENDS = 16  # under way at once, per lane
_CROWDED = 2_000  # one fewer for so many messages
_FULL = "no room for more in IronMQ (ironmq_max_bytes)"
_TOO_MANY = "no room for more messages in IronMQ: memory can't list them (buffer_max_bytes)"


class IronMQ:
    """The store of `mirror: ironmq`."""

    forgets_for_good = False  # a copy may come back until it expires
    reads_ahead = False  # a look shows the oldest messages, those on their way out too

    def __init__(self, client: Client, settings: Settings, books: Books) -> None:
        self.client = client
        self.books = books
        self._upkeep = Upkeep(client, books)
        self._orphans = Orphans(client, books, self._upkeep, settings)
        self._max_bytes = settings.ironmq_max_bytes
        self._most_held = max(_HELD_LEAST, settings.buffer_max_bytes // HELD_BYTES)
        self._timeout_s = settings.mirror_timeout
        self._most = settings.load_trigger_bytes
        self._latency_s = 0.05
        self._ratio = 2.0  # bytes of rows for each byte of a request

    @property
    def traits(self) -> Traits:
        """As learned so far."""
        fills_a_message = int(self.client.room(self.books.prefix) * self._ratio * 0.94)
        return Traits(
            batch_bytes=max(1, min(self._most, fills_a_message)),
            identity=self.books.process,
            recover_interval_s=RECOVER_INTERVAL_S,
            # fewer while many messages wait to be loaded, so that more rows share one
            appends_at_once=max(1, _APPENDS - len(self.books.known) // _CROWDED),
            linger_s=min(self._latency_s / 32, 0.05),
            queue_per_lane=True,
        )

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
        self.books.given_up |= failed is not None and not isinstance(failed, MirrorFull)
        if failed is not None and not isinstance(failed, MirrorUnavailable):
            for piece in stored:  # nobody will book them: to be recovered
                del self.books.known[piece.id]
            raise failed
        self.books.place(stored)
        if failed is None:
            self.client.health.works(time.perf_counter())
        elif not isinstance(failed, MirrorFull):
            self.client.health.fails(began, failed.detail)
        return Appended(stored, failed)

    async def _append(self, segment: Segment, stored: list[Segment]) -> None:
        """Post a segment, or the pieces that it takes; what is stored goes into the list."""
        queue, posted = self.books.queue_of(segment.lane), self.books.clock()
        if len(segment.data) <= INLINE_BYTES:
            content = self._pack(segment, posted)
        else:
            content = await asyncio.to_thread(self._pack, segment, posted)
        if len(content) > self.client.room(queue):
            await self._append_halves(segment, stored, self.client.room(queue) / len(content))
            return
        if len(segment.data) > INLINE_BYTES:
            self._ratio = max(0.1, min(len(segment.data) / len(content), self._ratio * 1.1))
        self.books.appending.add(segment.id)
        try:
            await self.client.make_queue(queue)
            started = time.perf_counter()
            id = await self.client.post(queue, content)
        finally:
            self.books.appending.discard(segment.id)
        self._latency_s += (time.perf_counter() - started - self._latency_s) / 8
        self.books.known[segment.id] = Held.of(id, segment, len(content), posted)
        stored.append(segment)

    def _pack(self, segment: Segment, posted: float) -> bytes:
        return encode_post(pack(segment, self.books.process, posted))

    async def _append_halves(self, segment: Segment, stored: list[Segment], fits: float) -> None:
        self._ratio *= 0.9
        first, rest = segment.cut(int(len(segment.data) * fits * 0.9))
        if rest is None:
            raise MirrorFull("an event, or a part of a POST with a key, is too large for IronMQ")
        await self._append(first, stored)
        await self._append(rest, stored)

    # --- read, remove ---

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """See `Store.read`. A look at the queue gives most of them, the others are fetched."""
        queue = self.books.queue_of(run.lane)
        wanted: list[tuple[int, Held]] = []
        size = 0
        for position, held in self.books.held.get(queue, {}).items():
            if run.after < position <= run.until:
                size += held.rows_bytes
                if wanted and (size > max_bytes or len(wanted) == MESSAGES_AT_ONCE):
                    break
                wanted.append((position, held))
        seen: dict[str, Message] = {}
        if len(wanted) > 1:  # those that wait longest come first, and these are they
            peeked = await self.client.peek(queue, MESSAGES_AT_ONCE)
            seen = {message.id: message for message in peeked}
        fetches = [self._fetch(run, position, held, seen) for position, held in wanted]
        return await asyncio.gather(*fetches)

    async def _fetch(
        self, run: Run, position: int, held: Held, seen: dict[str, Message]
    ) -> Segment:
        queue = self.books.queue_of(run.lane)
        message = seen.get(held.id)
        if message is None:
            if held.reservation:  # not said whether a reserved message can be read by its id
                async with self.books.leases[queue]:
                    await self._upkeep.release(queue, held)
            asked = None
            while message is None and asked != held.id:  # it may have been posted anew meanwhile
                asked = held.id
                message = await self.client.get(queue, asked)
        if message is not None:
            try:
                segment = await unpacked(envelope_of(message.body))
            except Unreadable as exc:
                await self._upkeep.quarantine(queue, message, str(exc))
            else:
                segment.source, segment.position = SOURCE, position
                return segment
        segment = Segment(
            run.lane, (), b"", held.events, id=held.segment, created_at=held.created,
            source=SOURCE, position=position,
        )  # fmt: skip
        segment.missing = True  # another process may have loaded it: the ledger knows
        return segment

    async def remove(self, removals: Sequence[Removal]) -> None:
        """See `Store.remove`."""
        by_queue: dict[str, list[Removal]] = {}
        for removal in removals:
            queue = self.books.queue_of(removal.lane)
            if removal.position in self.books.held.get(queue, {}):
                by_queue.setdefault(queue, []).append(removal)
        for queue, of_queue in by_queue.items():
            for at in range(0, len(of_queue), DELETE_MAX_IDS):
                async with self.books.leases[queue]:
                    await self._remove(queue, of_queue[at : at + DELETE_MAX_IDS])

    async def _remove(self, queue: str, removals: Sequence[Removal]) -> None:
        """Delete up to a hundred messages; one that somebody has reserved is deleted by a look."""
        held, now = self.books.held[queue], self.books.clock()
        there = [each for each in removals if each.position in held]
        entries = [held[each.position].entry(now) for each in there if not each.missing]
        refused = await self.client.delete(queue, entries)
        for removal in there:
            reserved = held[removal.position].id in refused
            if reserved:
                self.books.undeleted[removal.id] = queue
            # one that was lost sight of is recovered if it comes back
            self.books.given_up |= reserved or removal.missing
            self.books.forget(queue, removal.position)

    # --- what the parts do ---

    async def recover(self, membership: Membership) -> Found:
        """See `Store.recover`."""
        return await self._orphans.recover(membership)

    async def keep(self, membership: Membership) -> bool:
        """See `Store.keep`."""
        await self._upkeep.keep(membership)
        return self.books.given_up

    async def release(self) -> None:
        """See `Store.release`."""
        await self._upkeep.release_all()

    # --- for the page ---

    def state(self) -> MirrorState:
        full = _FULL if self.books.bytes >= self._max_bytes else None
        if len(self.books.known) >= self._most_held:
            full = full or _TOO_MANY
        health, (left, left_s) = self.client.health, self._orphans.left()
        return MirrorState(
            "ironmq", bool(health.up), health.error, self.books.bytes, self._max_bytes, full,
            self.client.calls, EXPIRATION_S, left, left_s,
        )  # fmt: skip


@asynccontextmanager
async def open_store(
    settings: Settings, process: str, clock: Callable[[], float] = time.time
) -> AsyncIterator[IronMQ]:
    """The store, with so many connections; nothing is sent until there is something to do."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
    ) as session:
        books = Books(process, settings.ironmq_queue_prefix, clock)
        store = IronMQ(Client(session, settings), settings, books)
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
        """See `MirrorPlugin.check`."""
        async with open_store(settings, "check") as store:
            try:
                queues = await store.client.queues(settings.ironmq_queue_prefix)
                sizes = [(queue, await store.client.size(queue)) for queue in queues]
            except (
                CallRefused
            ) as exc:  # 404 may be said of a project in which no queue was made yet
                return [("away" if exc.http_status == 404 else "fail", f"ironmq: {exc.detail}")]
            except MirrorUnavailable as exc:
                return [("away", f"ironmq: {exc.detail}")]
        found = [("ok", f"ironmq: the credentials work, {len(queues)} queues")]
        there = {queue: size for queue, size in sizes if size is not None}
        found += [("ok", f"ironmq queue {queue}: {size} messages") for queue, size in there.items()]
        prefix = settings.ironmq_queue_prefix
        lanes = {queue.removeprefix(prefix): size for queue, size in there.items()}
        ours = {lane: size for lane, size in lanes.items() if LANE.fullmatch(lane)}
        return found + unregistered("ironmq", ours, "message", settings)
