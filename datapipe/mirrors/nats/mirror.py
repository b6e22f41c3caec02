"""NATS JetStream as the mirror: a work-queue stream for each lane, shared by all processes.

Any process loads what any of them stored. The broker redelivers what nobody acknowledged, so there
are no heartbeats, leases or adoptions here. Memory holds only what is being stored or loaded.

An append is repeated under the segment's id, which JetStream stores once within two minutes; what
is stored or delivered twice all the same is the same segment to the ledger, which skips it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import structlog

from datapipe.errors import LaneBlocked, MirrorFull, MirrorUnavailable, SinkUnavailable
from datapipe.events.segment import SEGMENTS_AT_ONCE, Segment
from datapipe.mirrors import (
    Appended,
    FindMark,
    Membership,
    Mirror,
    MirrorPlugin,
    MirrorState,
    Recovery,
    Traits,
    Waiting,
)
from datapipe.mirrors.nats import wire
from datapipe.mirrors.nats.channel import NatsChannel
from datapipe.mirrors.nats.check import check_nats
from datapipe.mirrors.nats.client import ANSWER_S, ApiError, Client, NoResponders, decoded
from datapipe.mirrors.nats.hand import Hand
from datapipe.mirrors.nats.pairing import Pairing
from datapipe.mirrors.nats.prune import EVERY_S, FENCE_S, Pruning
from datapipe.mirrors.nats.pull import Delivery, Puller
from datapipe.mirrors.nats.streams import Stream, Streams
from datapipe.retry import backoff
from datapipe.settings import Settings

SEGMENT_BYTES = 900_000  # less than `max_payload`, 1 MB unless the servers say otherwise
_APPENDS = 8  # under way at once, per lane
_HEADERS_BYTES = 1024  # more than ours take
_RETRY_MAX_S = 0.5  # between two tries of an append
_IN_VAIN_S = 2.0  # after an append in vain the next ones are refused at once
_PRESSED_S = 0.1  # for which that is remembered: there may be a thousand lanes
_UNREADABLE_S = 600.0
_MAXED_OUT = 10077  # source: nats-io/nats-server, server/errors.json

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


class Nats:
    """Implements `Mirror`. `streams` knows what waits, `hand` what we have taken of it."""

    def __init__(self, client: Client, settings: Settings, process: str) -> None:
        self.streams = Streams(client, settings)
        self.channel = NatsChannel(client, settings.nats_prefix, process)
        self._client = client
        self._settings = settings
        self._prefix = settings.nats_prefix
        self._process = process
        self._puller = Puller(client, self._prefix)
        self._pairing = Pairing(client, self.streams, self._prefix)
        self._pruning = Pruning()
        self.hand = Hand(client, self.streams)
        self._put_off: set[str] = set()  # lanes
        self._pressed, self._pressed_at = False, -_PRESSED_S
        # lanes that were there at the start, and could not be seen yet; None: not started
        self._unseen: set[str] | None = None
        self.traits = Traits(
            # what turns out to be larger than `max_payload` is cut
            batch_bytes=max(1, min(SEGMENT_BYTES, settings.load_trigger_bytes)),
            identity=process, recover_interval_s=EVERY_S, appends_at_once=_APPENDS,
            queue_per_lane=True, keep_interval_s=1.0,
            group=wire.source_of(self._prefix), fence_s=FENCE_S,
        )  # fmt: skip

    @property
    def pressed(self) -> bool:
        """See `Mirror.pressed`: as much waits as would fill half of a memory, if there were one."""
        now = time.monotonic()
        if now - self._pressed_at > _PRESSED_S:
            known = self.streams.by_lane.items()
            able = sum([each.bytes for lane, each in known if lane not in self._put_off])
            self._pressed = able * 2 >= self._settings.buffer_max_bytes
            self._pressed_at = now
        return self._pressed

    def waiting(self, lane: str) -> Waiting:
        """See `Mirror.waiting`."""
        return self.streams.of(lane)

    def full(self, lanes: Iterable[str]) -> dict[str, str]:
        """See `Mirror.full`."""
        known = self.streams.by_lane
        return {
            lane: why for lane in lanes if lane in known and (why := known[lane].full) is not None
        }

    # --- append ---

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Mirror.append`. What does not fit into one message is cut."""
        until = asyncio.get_running_loop().time() + self._settings.mirror_timeout
        pieces: list[list[Segment]] = [[] for _ in segments]
        outcomes = await asyncio.gather(
            *(self._append(each, into, until) for each, into in zip(segments, pieces, strict=True)),
            return_exceptions=True,
        )
        stored = [piece for into in pieces for piece in into]
        failed = next((each for each in outcomes if each is not None), None)
        if failed is not None and not isinstance(failed, MirrorUnavailable):
            raise failed
        return Appended(stored, failed)

    async def _append(self, segment: Segment, stored: list[Segment], until: float) -> None:
        payload = wire.encode(segment)
        most = self._client.max_payload - _HEADERS_BYTES
        if 0 < most < len(payload):
            first, rest = segment.cut(len(segment.data) // 2)
            if rest is None:
                what = "an event, or a part of a POST with a key, is too large for NATS"
                raise MirrorFull(f"{what} (max_payload of its servers)")
            await self._append(first, stored, until)
            await self._append(rest, stored, until)
            return
        await self._publish(segment, payload, until)
        self.streams.of(segment.lane).entered(segment.events, len(payload))
        stored.append(segment)

    async def _publish(self, segment: Segment, payload: bytes, until: float) -> None:
        """Under the same id until it is stored, or the time is over.

        Raises: MirrorUnavailable: it may be stored all the same, now or later; MirrorFull.
        """
        subject = wire.subject_of(self._prefix, segment.lane, segment.events)
        headers = wire.headers_of(self._prefix, segment)
        failures, again, stream = 0, False, self.streams.of(segment.lane)
        while True:
            try:
                async with asyncio.timeout_at(until):
                    await self.streams.ensure(segment.lane, again=again)
                left = until - asyncio.get_running_loop().time()
                if left <= 0:  # we slept; later than that no copy may be stored: see `prune`
                    raise TimeoutError
                answer = await self._client.request(
                    "publish", subject, payload, headers=headers, timeout_s=min(ANSWER_S, left)
                )
                decoded(answer.data)
                return
            except TimeoutError:
                error = MirrorUnavailable(f"NATS: no answer about the stream {stream.name}")
            except MirrorFull:
                raise
            except ApiError as exc:
                if exc.code == _MAXED_OUT:
                    stream.is_full()
                    raise MirrorFull(stream.full or exc.detail) from exc
                error = exc
            except MirrorUnavailable as exc:
                error, again = exc, isinstance(exc, NoResponders)
            failures += 1
            pause_s = backoff(failures, _RETRY_MAX_S)
            if asyncio.get_running_loop().time() + pause_s >= until:
                stream.refuse(error.detail, _IN_VAIN_S)
                raise error
            await asyncio.sleep(pause_s)

    # --- take ---

    async def take(self, lane: str, max_bytes: int) -> list[Segment]:
        """See `Mirror.take`."""
        if not self._pairing.seen:  # it might be another database's
            raise MirrorUnavailable("NATS: whether these events are ours is not known yet")
        await self.hand.requeued(lane)
        stream = await self.streams.ensure(lane)
        segments = await self._take(stream, max_bytes)
        if not segments and (put_off_s := self.hand.put_off_s(lane)) > 0:
            await asyncio.sleep(put_off_s)
            segments = await self._take(stream, max_bytes)
        return segments

    async def _take(self, stream: Stream, max_bytes: int) -> list[Segment]:
        usual = stream.bytes // stream.messages if stream.messages else SEGMENT_BYTES
        batch = max(1, min(SEGMENTS_AT_ONCE, max_bytes // max(1, usual)))
        segments = []
        try:
            deliveries = await self._puller.pull(stream, batch, max_bytes)
        except NoResponders:
            await self.streams.ensure(stream.lane, again=True)
            raise
        for delivery in deliveries:
            if (segment := self._delivered(delivery)) is not None:
                segments.append(segment)
        return segments

    def _delivered(self, delivery: Delivery) -> Segment | None:
        """The segment, unless we have it already."""
        try:
            segment = wire.decode(
                self._prefix, delivery.subject, delivery.headers, delivery.data, delivery.position
            )
        except wire.Unreadable as exc:
            log.error("message unreadable", subject=delivery.subject, error=str(exc),
                      sequence=delivery.position)  # fmt: skip
            self.hand.refuse([delivery.reply], _UNREADABLE_S)
            return None
        return segment if self.hand.receive(segment, delivery) else None

    # --- remove, requeue ---

    def remove(self, segments: Sequence[Segment]) -> asyncio.Future[None]:
        """See `Mirror.remove`."""
        self._put_off.difference_update(segment.lane for segment in segments)
        return self.hand.remove(segments)

    def requeue(self, lane: str, segments: Sequence[Segment], *, put_off: bool) -> None:
        """See `Mirror.requeue`."""
        (self._put_off.add if put_off else self._put_off.discard)(lane)
        self.hand.requeue(lane, segments, put_off=put_off)

    # --- recover, keep ---

    async def recover(self, membership: Membership) -> Recovery:
        """See `Mirror.recover`. There is nothing to take over: the broker redelivers.

        What is looked at here are the streams of all lanes, of those without a class, too; and the
        ledger forgets what can't come back.
        """
        now: float | None = None
        with suppress(SinkUnavailable, LaneBlocked):
            now = await membership.database_time()  # before the streams are read
        began = time.monotonic()
        try:
            await self.streams.find()
        finally:  # one that can't be seen holds up its own lane alone
            await self._pairing.look(membership)
        if now is not None and self._pairing.seen:
            await self._prune(membership, now, began)
        waiting = {lane for lane, stream in self.streams.by_lane.items() if stream.messages}
        found = Recovery(unregistered={lane for lane in waiting if not membership.can_load(lane)})
        self._put_off |= found.unregistered
        if self._unseen is None:
            self._unseen = set(self.streams.by_lane)
        found.due = waiting & self._unseen
        self._unseen -= {
            lane for lane, stream in self.streams.by_lane.items() if stream.looked_at > began
        }
        return found

    async def keep(self, membership: Membership) -> bool:
        """See `Mirror.keep`: look at what waits."""
        self._puller.forget_late()
        await self.streams.look()
        return not self._pairing.seen

    async def _prune(self, membership: Membership, now: float, since: float) -> None:
        """Args: now: by the database's clock. since: the same moment (`time.monotonic`)."""
        before = {}
        for lane, stream in self.streams.by_lane.items():
            if stream.there and stream.looked_at > since:
                old = self._pruning.look(lane, now, stream.first_seq, stream.last_seq)
                if old is not None:
                    before[lane] = old
        if before:
            with suppress(SinkUnavailable, LaneBlocked):  # the next notes cover them
                await membership.expire_lanes(self.traits.group, before)

    def expirable(self) -> list[str]:
        """See `Mirror.expirable`: none, one by one; `recover` has them forgotten lane by lane."""
        return []

    async def settle(self, timeout_s: float) -> None:
        """See `Mirror.settle`."""
        await self.hand.settle(timeout_s)

    def state(self) -> MirrorState:
        streams = [stream for stream in self.streams.by_lane.values() if stream.there]
        health = self._client.health
        return MirrorState(
            "nats", bool(health.up), health.error, sum([each.bytes for each in streams]),
            sum([each.max_bytes for each in streams]), calls=self._client.calls,
            fullest=max([s.bytes / s.max_bytes for s in streams if s.max_bytes > 0], default=None),
        )  # fmt: skip


@asynccontextmanager
async def open_nats(settings: Settings, process: str) -> AsyncIterator[Nats]:
    """Open the mirror; it connects in the background."""
    client = Client(settings)
    mirror = Nats(client, settings, process)
    async with client.connecting():
        hold = asyncio.create_task(mirror.hand.hold())
        try:
            yield mirror
        finally:
            hold.cancel()
            await mirror.settle(1.0)


class NatsPlugin(MirrorPlugin):
    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Mirror]:
        return open_nats(settings, process)

    async def check(self, settings: Settings) -> list[tuple[str, str]]:
        """See `MirrorPlugin.check`."""
        return await check_nats(settings)

    async def check_paired(
        self, settings: Settings, find_mark: FindMark | None
    ) -> list[tuple[str, str]]:
        """See `MirrorPlugin.check_paired`."""
        return await check_nats(settings, find_mark=find_mark)
