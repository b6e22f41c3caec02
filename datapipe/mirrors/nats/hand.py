"""What this process has in hand: taken from the streams, and neither removed nor given back.

A delivery is ours for `ACK_WAIT_S`; while we work on it the server is told so. Removals are
acknowledged, and the server confirms that; what is given back is taken by anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors.nats.client import ANSWER_S, Client
from datapipe.mirrors.nats.pull import Delivery
from datapipe.mirrors.nats.streams import ACK_WAIT_S, Streams
from datapipe.retry import backoff

_PUT_OFF_S = 1.0  # until another process may take what could not be loaded here
_AT_ONCE = 64  # acknowledgements
_PATIENCE_S = 120.0  # then it is redelivered, and the ledger skips it
_RETRY_MAX_S = 2.0

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


@dataclass(slots=True)
class Held:
    """A segment that we have taken. Attributes: reply: of its newest delivery."""

    lane: str
    reply: str
    events: int
    bytes: int


class Hand:
    """Attributes: held: by segment; so are those that are being removed."""

    def __init__(self, client: Client, streams: Streams) -> None:
        self.held: dict[str, Held] = {}
        self.removing: dict[str, Held] = {}
        self._client = client
        self._streams = streams
        self._put_off_until: dict[str, float] = {}  # by lane: what was given back can be taken then
        self._tasks: set[asyncio.Task[None]] = set()
        self._requeues: dict[str, asyncio.Task[None]] = {}  # the last one under way, by lane

    def receive(self, segment: Segment, delivery: Delivery) -> bool:
        """It was delivered; whether it is new to us: else it is acknowledged where it came anew."""
        for known in (self.held, self.removing):
            if (held := known.get(segment.id)) is not None:
                held.reply = delivery.reply
                return False
        self.held[segment.id] = Held(
            segment.lane, delivery.reply, segment.events, len(delivery.data)
        )
        self._streams.of(segment.lane).in_memory += segment.events
        return True

    def _released(self, segments: Iterable[Segment]) -> Iterator[tuple[str, Held]]:
        for segment in segments:
            if (held := self.held.pop(segment.id, None)) is not None:
                self._streams.of(held.lane).in_memory -= held.events
                yield segment.id, held

    # --- remove ---

    def remove(self, segments: Sequence[Segment]) -> asyncio.Task[None]:
        """See `Mirror.remove`."""
        removing = dict(self._released(segments))
        self.removing |= removing
        for held in removing.values():
            self._streams.of(held.lane).left(held.events, held.bytes)
        return self._start(self._remove(removing))

    async def _remove(self, removing: dict[str, Held]) -> None:
        left = list(removing.items())
        try:
            while left:
                await asyncio.gather(*(self._acknowledge(held) for _, held in left[:_AT_ONCE]))
                for id, _ in left[:_AT_ONCE]:
                    del self.removing[id]
                del left[:_AT_ONCE]
        finally:  # what is redelivered must be taken again
            for id, _ in left:
                del self.removing[id]

    async def _acknowledge(self, held: Held) -> None:
        """Until the server has confirmed it, or will have redelivered it long since."""
        until, failures = time.monotonic() + _PATIENCE_S, 0
        while True:
            try:
                await self._client.request("ack", held.reply, b"+ACK")
                return
            except MirrorUnavailable:
                failures += 1
                if time.monotonic() >= until:
                    log.warning("not acknowledged", lane=held.lane, events=held.events)
                    return
                await asyncio.sleep(backoff(failures, _RETRY_MAX_S))

    # --- give back ---

    def requeue(self, lane: str, segments: Sequence[Segment], *, put_off: bool) -> None:
        """See `Mirror.requeue`.

        What other processes can't load either must not go round and round between them.
        """
        delay_s = _PUT_OFF_S if put_off else 0.0
        if replies := [held.reply for _, held in self._released(segments)]:
            self._put_off_until[lane] = time.monotonic() + delay_s
            self._requeues[lane] = self.refuse(replies, delay_s)

    def refuse(self, replies: Sequence[str], delay_s: float) -> asyncio.Task[None]:
        """Have deliveries be redelivered once the delay is over."""
        return self._start(self._refuse(replies, delay_s))

    async def _refuse(self, replies: Sequence[str], delay_s: float) -> None:
        """Confirmed, so that they can be taken in their order once this has ended."""
        body = b'-NAK {"delay": %d}' % int(delay_s * 1e9) if delay_s else b"-NAK"
        for at in range(0, len(replies), _AT_ONCE):
            some = [self._client.request("nak", each, body) for each in replies[at:][:_AT_ONCE]]
            # one that does not arrive: they come back by themselves
            await asyncio.gather(*some, return_exceptions=True)

    async def requeued(self, lane: str) -> None:
        """What was given back is there again, or soon."""
        if (requeue := self._requeues.get(lane)) is not None:
            await asyncio.wait([requeue], timeout=ANSWER_S)

    def put_off_s(self, lane: str) -> float:
        """Seconds until what was given back last can be taken."""
        return self._put_off_until.pop(lane, 0.0) - time.monotonic()

    # --- hold ---

    async def hold(self) -> None:
        """For ever: tell the server that we work on what we have taken."""
        while True:
            await asyncio.sleep(ACK_WAIT_S / 3)
            try:
                await self._hold()
            except Exception:  # unforeseen; without this task all that loads would be redelivered
                log.critical("background task died", task="hold", exc_info=True)

    async def _hold(self) -> None:
        for number, held in enumerate(list(self.held.values())):
            with suppress(MirrorUnavailable):
                await self._client.publish("hold", held.reply, b"+WPI")
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)  # requests come in between

    async def settle(self, timeout_s: float) -> None:
        """See `Mirror.settle`."""
        if replies := [held.reply for held in self.held.values()]:  # their loads were cut short
            self.refuse(replies, 0.0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.critical("background task died", task="acknowledgements", exc_info=exc)
