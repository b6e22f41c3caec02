"""Pull: the next messages of a lane, by raw requests into one inbox that stays.

A pull ends when as many messages are here as the server says that it sent. It says so by a status
message, which may overtake them; what still comes after we gave up waiting is kept for the next
pull. Source: nats-io/nats-architecture-and-design, ADR-13 and ADR-37.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import msgspec
from nats.aio.msg import Msg

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats.client import ANSWER_S, Client, NoResponders
from datapipe.mirrors.nats.streams import ACK_WAIT_S, CONSUMER, Stream

# For the first message, where some are known to wait: a replica may be behind what was stored. Who
# is asked in vain, as others have them all, answers so after it.
_BEHIND_S = 0.1
_STALE_S = ACK_WAIT_S / 2  # a message that came late, and lay here for so long, is left to others


class Delivery(NamedTuple):
    """A message that is ours until it is acknowledged, or `ACK_WAIT_S` have passed.

    Attributes:
        reply: where it is acknowledged.
        at: when it came (`time.monotonic`).
    """

    subject: str
    reply: str
    headers: dict[str, str] | None
    data: bytes
    at: float

    @property
    def position(self) -> int:
        """Its sequence in the stream: $JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>..."""
        return int(self.reply.split(".")[-4])


class _Pull:
    """One request. Attributes: sent: how many messages were, once the server has said so."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.sent = batch
        self.status: str | None = None
        self.deliveries: list[Delivery] = []
        self.news = asyncio.Event()

    @property
    def done(self) -> bool:
        return len(self.deliveries) >= self.sent


class Puller:
    """Pulls for all lanes, one pull at a time for each."""

    def __init__(self, client: Client, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._inbox = ""
        self._numbers = itertools.count()
        self._pulls: dict[str, _Pull] = {}  # under way, by lane
        self._by_number: dict[str, _Pull] = {}
        self._late: defaultdict[str, list[Delivery]] = defaultdict(list)  # by lane

    async def pull(self, stream: Stream, batch: int, max_bytes: int) -> list[Delivery]:
        """Up to `batch` messages of up to `max_bytes`; one at least, if any can be had.

        Raises: MirrorUnavailable: none came, and it is not known whether there are any.
        """
        fresh = time.monotonic() - _STALE_S
        if late := [each for each in self._late.pop(stream.lane, ()) if each.at > fresh]:
            return late
        body = {"batch": batch, "no_wait": True}
        if batch > 1:
            body["max_bytes"] = max_bytes
        if stream.parked:
            body["expires"] = int(_BEHIND_S * 1e9)
        pull = await self._pull(stream, body)
        if not pull.deliveries and pull.status == "409":  # the first alone is larger
            pull = await self._pull(stream, {"batch": 1, "no_wait": True})
        return pull.deliveries

    def forget_late(self) -> None:
        """Of lanes that are not pulled any more: what came late is left to others."""
        fresh = time.monotonic() - _STALE_S
        for lane, late in list(self._late.items()):
            if all(each.at <= fresh for each in late):
                del self._late[lane]

    async def _pull(self, stream: Stream, body: dict[str, int]) -> _Pull:
        if not self._inbox:
            self._inbox = self._client.new_inbox()
            await self._client.subscribe(f"{self._inbox}.*", self._on_message)
        number, pull = str(next(self._numbers)), _Pull(body["batch"])
        self._pulls[stream.lane] = self._by_number[number] = pull
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream.name}.{CONSUMER}"
        payload = msgspec.json.encode(body)
        try:
            await self._client.publish("next", subject, payload, f"{self._inbox}.{number}")
            while not pull.done:
                pull.news.clear()
                before = len(pull.deliveries)
                with suppress(TimeoutError):
                    async with asyncio.timeout(ANSWER_S):
                        await pull.news.wait()
                        continue
                if len(pull.deliveries) == before:  # nothing more comes
                    break
        except BaseException:
            self._late[stream.lane] += pull.deliveries
            raise
        finally:
            del self._by_number[number]
            del self._pulls[stream.lane]
        if pull.status is None and not pull.deliveries:
            raise MirrorUnavailable(f"NATS does not answer within {ANSWER_S:g} s")
        if pull.status == "503":
            raise NoResponders(f"NATS: the stream {stream.name} or its consumer is not there")
        return pull

    async def _on_message(self, message: Msg) -> None:
        headers = message.headers or {}
        if not message.reply and (status := headers.get("Status")):
            pull = self._by_number.get(message.subject.rpartition(".")[2])
            if pull is not None:
                left = headers.get("Nats-Pending-Messages")
                # without it, it was cut short: by a new leader, say
                pull.sent = pull.batch - int(left) if left else len(pull.deliveries)
                pull.status = status
                pull.news.set()
            return
        delivery = Delivery(
            message.subject, message.reply, message.headers, message.data, time.monotonic()
        )
        lane = message.subject.removeprefix(f"{self._prefix}.").partition(".")[0]
        if (pull := self._pulls.get(lane)) is None:
            self._late[lane].append(delivery)
            return
        pull.deliveries.append(delivery)
        if pull.done:
            pull.news.set()
