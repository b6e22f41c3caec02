"""IronMQ as the mirror: one queue per lane, one message per segment.

A message is anyone's: what is reserved can't be filtered, and an answer may be lost after its
effect. So this is how nothing is lost and nothing doubled:

- A message names its segment and its sender. A post is repeated with the same segment id, so a
  copy that was stored without an answer is the same segment to the ledger, which skips it.
- While its sender lives, a message is the sender's: it is loaded from the sender's memory, and
  deleted by id after the commit. Nobody reserves it.
- A sender that is silent (its heartbeat in the database stands still, see `datapipe.watch`) is
  taken to be dead, and whoever sees it first reserves its messages, loads and deletes them. If it
  lives after all, both load, and the ledger lets one of them through; to the other they are
  duplicates, so its books still balance.
- A message of ours that our books don't know (its append was given up on, yet stored) is recovered
  the same way.
- A message whose form is not ours is moved to `<queue>-unreadable`, never dropped.

Leases are long, and prolonged while a recovered segment still waits. Messages live 30 days at the
most; at 80 % of that one is posted anew, with the same segment id, and the old one deleted.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from datapipe.errors import MirrorFull, MirrorUnavailable
from datapipe.mirrors import MirrorState, Run
from datapipe.mirrors.ironmq_client import (
    EXPIRATION_S,
    REQUEST_MAX_BYTES,
    Client,
    Message,
)
from datapipe.mirrors.ironmq_wire import Unreadable, envelope_of, pack, unpack
from datapipe.segment import Segment
from datapipe.settings import Settings

BODY_MAX_BYTES = REQUEST_MAX_BYTES - 2_048  # less the request's head, and quotes that are escaped
LEASE_S = 600
AGE_LIMIT = 0.8  # of a message's life: then it is posted anew
_PACK_INLINE_BYTES = 4_096  # more is packed in a thread
_APPENDS = 16  # under way at once, per lane

_FULL = "no room for more in IronMQ (ironmq_max_bytes)"
_T = TypeVar("_T")
log = structlog.stdlib.get_logger("datapipe.mirrors.ironmq")


@dataclass(slots=True)
class Held:
    """A message of ours: posted by us, or recovered under a lease."""

    id: str
    segment: str
    events: int
    bytes: int
    rows_bytes: int
    posted: float
    created: float
    reservation: str | None = None
    lease_until: float = 0.0


class IronMQ:
    """The mirror; recovery of other processes' messages is in `ironmq_recovery`."""

    parks = True
    appends_at_once = _APPENDS
    forgets_for_good = False  # a copy may come back until it expires
    recover_interval_s = 1800.0

    def __init__(
        self, client: Client, settings: Settings, process: str, clock: Callable[[], float]
    ) -> None:
        self.client = client
        self.process = process
        self.identity = process
        self.clock = clock
        self.prefix = settings.ironmq_queue_prefix
        self.appending: set[str] = set()  # segments whose post is under way
        self.given_up = False  # a post of ours may be stored though it failed
        self.held: dict[str, dict[int, Held]] = {}  # by queue and position
        self.known: dict[str, tuple[str, int]] = {}  # by segment: where it is held
        self._max_bytes = settings.ironmq_max_bytes
        self._bytes = 0
        self._positions = itertools.count(1)
        self._made: set[str] = set()
        self._error: str | None = None
        self._latency_s = 0.05
        self._ratio = 2.0  # bytes of rows for each byte of a message's body
        self._most = settings.load_trigger_bytes

    @property
    def segment_max_bytes(self) -> int:
        """Rows that will fill a message, going by those before."""
        return max(1, min(self._most, int(BODY_MAX_BYTES * self._ratio * 0.94)))

    @property
    def gather_s(self) -> float:
        return min(self._latency_s / 16, 0.05)

    def queue_of(self, lane: str) -> str:
        return self.prefix + lane

    # --- append ---

    async def append(self, segments: Sequence[Segment]) -> list[Segment]:
        """See `Mirror.append`. What does not fit into one message is cut."""
        if (why := self.state().full) is not None:
            raise MirrorFull(why)
        outcomes = await asyncio.gather(
            *(self._append(segment) for segment in segments), return_exceptions=True
        )
        stored: list[Segment] = []
        failed: BaseException | None = None
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                failed = outcome
                stored += getattr(outcome, "stored", ())
            else:
                stored += outcome
        if failed is None:
            self._error = None
            return stored
        if isinstance(failed, MirrorUnavailable):
            self.given_up = True
            self._error = failed.detail
            raise MirrorUnavailable(failed.detail, stored=stored)
        raise failed

    async def _append(self, segment: Segment) -> list[Segment]:
        posted = self.clock()
        if len(segment.data) <= _PACK_INLINE_BYTES:
            body = pack(segment, self.process, posted)
        else:
            body = await asyncio.to_thread(pack, segment, self.process, posted)
        if len(body) > BODY_MAX_BYTES:
            return await self._append_halves(segment, len(body))
        if len(segment.data) > _PACK_INLINE_BYTES:
            self._ratio = max(0.5, min(len(segment.data) / len(body), self._ratio * 1.1))
        queue = self.queue_of(segment.lane)
        self.appending.add(segment.id)
        try:
            if queue not in self._made:
                await self.client.create_queue(queue)
                self._made.add(queue)
            started = time.perf_counter()
            id = await self.client.post(queue, body)
        finally:
            self.appending.discard(segment.id)
        self._latency_s += (time.perf_counter() - started - self._latency_s) / 8
        self.hold(queue, segment, Message(id, body), posted)
        return [segment]

    async def _append_halves(self, segment: Segment, size: int) -> list[Segment]:
        self._ratio *= 0.9
        first, rest = segment.cut(int(len(segment.data) * BODY_MAX_BYTES / size * 0.9))
        if rest is None:
            raise MirrorUnavailable("an event is too large for IronMQ's 64 KB")
        stored = await self._append(first)
        try:
            return stored + await self._append(rest)
        except MirrorUnavailable as exc:
            raise MirrorUnavailable(exc.detail, stored=[*stored, *exc.stored]) from exc

    def hold(
        self, queue: str, segment: Segment, message: Message, posted: float, lease_until: float = 0
    ) -> None:
        """Keep a message in our books, and tell its segment where it is."""
        segment.source, segment.position = queue, next(self._positions)
        held = Held(
            message.id, segment.id, segment.events, len(message.body), len(segment.data), posted,
            segment.created_at, message.reservation_id, lease_until,
        )  # fmt: skip
        self.held.setdefault(queue, {})[segment.position] = held
        self.known[segment.id] = (queue, segment.position)
        self._bytes += held.bytes

    # --- read, remove ---

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """See `Mirror.read`. Parked messages are fetched by id, a request each."""
        held = self.held.get(run.source, {})
        wanted: list[tuple[int, Held]] = []
        size = 0
        for position, each in held.items():
            if run.after < position <= run.until:
                if wanted and size + each.rows_bytes > max_bytes:
                    break
                wanted.append((position, each))
                size += each.rows_bytes
        return list(
            await asyncio.gather(*(self._fetch(run, position, each) for position, each in wanted))
        )

    async def _fetch(self, run: Run, position: int, held: Held) -> Segment:
        if held.reservation:  # not said whether a reserved message can be read by its id
            lease = Message(held.id, "", held.reservation)
            await self._noting(self.client.release(run.source, lease))
            held.reservation = None
        message = await self._noting(self.client.get(run.source, held.id))
        if message is not None:
            try:
                segment = await asyncio.to_thread(unpack, envelope_of(message.body))
            except Unreadable as exc:
                log.error("message unreadable", queue=run.source, message=held.id, error=str(exc))
            else:
                segment.source, segment.position = run.source, position
                return segment
        segment = Segment(
            run.lane, (), b"", held.events, id=held.segment, created_at=held.created,
            source=run.source, position=position,
        )  # fmt: skip
        segment.gone = True  # another process may have loaded it: the ledger will tell
        return segment

    async def remove(self, segments: Sequence[Segment]) -> None:
        """See `Mirror.remove`."""
        by_queue: dict[str, list[int]] = {}
        for segment in segments:
            if segment.position in self.held.get(segment.source, {}):
                by_queue.setdefault(segment.source, []).append(segment.position)
        for queue, positions in by_queue.items():
            now = self.clock()
            held = [self.held[queue][position] for position in positions]
            entries = [(h.id, h.reservation if now < h.lease_until else None) for h in held]
            await self._noting(self.client.delete(queue, entries))
            for position in positions:
                gone = self.held[queue].pop(position)
                self.known.pop(gone.segment, None)
                self._bytes -= gone.bytes

    async def keep(self) -> None:
        """See `Mirror.keep`: prolong leases, post anew what is close to its expiration."""
        now = self.clock()
        for queue, by_position in self.held.items():
            for held in list(by_position.values()):
                if held.reservation and held.lease_until - now < LEASE_S / 2:
                    await self._touch(queue, held)
                if now - held.posted > EXPIRATION_S * AGE_LIMIT:
                    await self._post_anew(queue, held)

    async def _touch(self, queue: str, held: Held) -> None:
        now = self.clock()
        try:
            message = await self.client.touch(
                queue, Message(held.id, "", held.reservation), LEASE_S
            )
        except MirrorUnavailable:
            held.reservation = None  # lost: the message is anyone's again, and the ledger decides
        else:
            held.reservation, held.lease_until = message.reservation_id, now + LEASE_S

    async def _post_anew(self, queue: str, held: Held) -> None:
        message = await self.client.get(queue, held.id)
        if message is None:
            return
        segment = await asyncio.to_thread(unpack, envelope_of(message.body))
        posted = self.clock()
        body = await asyncio.to_thread(pack, segment, self.process, posted)
        old = (held.id, held.reservation if posted < held.lease_until else None)
        held.id, held.posted = await self.client.post(queue, body), posted
        held.reservation = None
        await self.client.delete(queue, [old])

    async def _noting(self, call: Awaitable[_T]) -> _T:
        """Await a call, and note whether IronMQ works."""
        try:
            result = await call
        except MirrorUnavailable as exc:
            self._error = exc.detail
            raise
        self._error = None
        return result

    # --- for the page ---

    def drained(self) -> list[str]:
        return []

    def state(self) -> MirrorState:
        return MirrorState(
            "ironmq", self._error is None, self._error, self._bytes, self._max_bytes,
            _FULL if self._bytes >= self._max_bytes else None, self.client.calls, EXPIRATION_S,
        )  # fmt: skip

    async def check(self) -> list[tuple[str, str]]:
        try:
            queues = await self.client.queues(self.prefix)
            infos = [(queue, await self.client.info(queue)) for queue in queues]
        except MirrorUnavailable as exc:
            return [("fail", f"ironmq: {exc.detail}")]
        found = [("ok", f"ironmq: the credentials work, {len(queues)} queues")]
        return found + [
            ("ok", f"ironmq queue {queue}: {info['size']} messages")
            for queue, info in infos
            if info
        ]
