"""The streams of all lanes: what is known of each, and how they are made.

One work-queue stream for each lane, and on it one durable pull consumer that all processes share.
Both are made when a lane gets its first event, as far as we may.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection
from datetime import datetime
from typing import Any

import structlog

from datapipe.errors import MirrorFull, MirrorUnavailable
from datapipe.mirrors.nats.client import ANSWER_S, ApiError, Client, Denied
from datapipe.mirrors.nats.wire import stream_of, subject_of
from datapipe.settings import Settings

CONSUMER = "load"
ACK_WAIT_S = 30.0
_DUPLICATE_WINDOW_S = 120.0
_LOOKS_AT_ONCE = 16
_LOOKS = 100  # a second, at lanes in which nothing happens here; each takes 0.2 ms of ours
_UNSEEN_S = 5.0  # between two looks at one that can't be seen
_BRIEFLY_S = 0.25  # for such a look: all others wait for it
_UNKNOWN_S = 60.0  # after the last look it is not known any more how old the oldest is
_REFUSED_S = 5.0  # for which a stream that can't be made is not tried again
_CREATE_S = 10.0  # a new stream waits for its leader
_NS = 1_000_000_000

# Codes of JetStream. Source: nats-io/nats-server, server/errors.json.
NO_PEERS, NOT_CLUSTERED, NO_STREAM, NO_CONSUMER, OTHER_CONFIG = 10005, 10074, 10059, 10014, 10058
_PASSING = {OTHER_CONFIG, 10004, 10008, 10009}  # the last three: while a leader is elected

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


def stream_config(settings: Settings, lane: str) -> dict[str, Any]:
    """A lane's stream, as JetStream's STREAM.CREATE wants it, but for its replicas."""
    prefix = settings.nats_prefix
    return {
        "name": stream_of(prefix, lane),
        "subjects": [subject_of(prefix, lane, "*")],
        "retention": "workqueue",
        "storage": "file",
        "discard": "new",
        "max_bytes": settings.nats_lane_max_bytes,
        "max_age": 0,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "duplicate_window": int(_DUPLICATE_WINDOW_S * _NS),
    }


def consumer_config() -> dict[str, Any]:
    """The consumer that all processes share, as CONSUMER.CREATE wants it."""
    return {
        "name": CONSUMER,
        "durable_name": CONSUMER,
        "ack_policy": "explicit",
        "ack_wait": int(ACK_WAIT_S * _NS),
        "deliver_policy": "all",
        "max_ack_pending": -1,
        "max_deliver": -1,
    }


class Stream:
    """What is known of a lane's stream; between looks it follows what we do. See `Waiting`.

    Attributes:
        name: of the stream.
        there: it has been seen.
        messages, events, bytes: of all that waits for any process.
        in_memory: events that this process has taken.
        first_seq, last_seq: of the stream.
        looked_at: when that was read (`time.monotonic`).
    """

    def __init__(self, lane: str, name: str) -> None:
        self.lane = lane
        self.name = name
        self.there = False
        self.messages = self.events = self.bytes = self.max_bytes = 0
        self.in_memory = 0
        self._oldest: float | None = None
        self.first_seq = self.last_seq = 0
        self.looked_at = -math.inf
        self.unseen_at = -math.inf  # when the last look began, if that has not succeeded
        self.active = False  # something was appended or removed since the last look
        self._refuses = False  # the last message, and nothing has left it since
        self.making = asyncio.Lock()
        self._refused: str | None = None  # why not to try: it can't be made, or does not answer
        self._refused_until = 0.0

    @property
    def parked(self) -> int:
        return max(0, self.events - self.in_memory)

    @property
    def oldest(self) -> float | None:
        """Unix time by our clock at which the oldest message was stored; see `Waiting.oldest`."""
        known = time.monotonic() - self.looked_at < _UNKNOWN_S
        return self._oldest if known else -math.inf

    @property
    def full(self) -> str | None:
        """Why nothing more can be stored, as far as is known."""
        if self._refused is not None and time.monotonic() < self._refused_until:
            return self._refused
        few = min(1 << 20, self.max_bytes // 16)
        # 0: not looked at yet; -1: somebody made it without a limit
        short = self.max_bytes > 0 and self.max_bytes - self.bytes < few
        if self.there and (self._refuses or short):
            return f"no room for {self.lane}: its stream {self.name} is full (nats_lane_max_bytes)"
        return None

    def entered(self, events: int, size: int) -> None:
        """A message was stored."""
        self.active = True
        if not self.messages:
            self._oldest = time.time()
        self.messages += 1
        self.events += events
        self.bytes += size

    def left(self, events: int, size: int) -> None:
        """A message was loaded, and is being removed."""
        self.active, self._refuses = True, False
        self.messages = max(0, self.messages - 1)
        self.events = max(0, self.events - events)
        self.bytes = max(0, self.bytes - size)
        if not self.messages:  # the sizes that we count lack what the server stores beside
            self.bytes, self._oldest = 0, None

    def refuse(self, why: str, seconds: float) -> None:
        """What comes within that time is refused at once, as if it were full."""
        self._refused, self._refused_until = why, time.monotonic() + seconds

    def is_full(self) -> None:
        """It refused a message."""
        self.active = self._refuses = True

    def is_gone(self) -> None:
        """There is no such stream, or none yet."""
        self.there, self.looked_at = False, time.monotonic()
        self.messages = self.events = self.bytes = 0
        self._oldest = None

    def saw(self, info: dict[str, Any]) -> None:
        """An answer to STREAM.INFO, with the subjects."""
        state, config = info["state"], info["config"]
        self.there, self._refused, self._refuses = True, None, False
        self.max_bytes = config["max_bytes"]
        self.first_seq, self.last_seq = state["first_seq"], state["last_seq"]
        self.messages, self.bytes = state["messages"], state["bytes"]
        subjects = state.get("subjects") or {}
        self.events = sum([count * _events(subject) for subject, count in subjects.items()])
        age_s = _time(info["ts"]) - _time(state["first_ts"])  # both by the servers' clock
        self._oldest = time.time() - max(0.0, age_s) if self.messages else None
        self.looked_at = time.monotonic()


def _events(subject: str) -> int:
    token = subject.rpartition(".")[2]
    return int(token) if token.isdigit() else 0  # somebody else's message


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


class Streams:
    """All lanes' streams, by lane."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self.by_lane: dict[str, Stream] = {}
        self._client = client
        self._settings = settings
        self._prefix = settings.nats_prefix

    def of(self, lane: str) -> Stream:
        """What is known of a lane's stream, be it there or not."""
        if lane not in self.by_lane:
            self.by_lane[lane] = Stream(lane, stream_of(self._prefix, lane))
        return self.by_lane[lane]

    # --- look ---

    async def find(self) -> None:
        """List all streams of the prefix, and look at them and at those of our own lanes.

        Raises: MirrorUnavailable: none can be seen.
        """
        try:
            for name in await self.names():  # one that is being made may not be there yet
                self.of(name.removeprefix(f"{self._prefix}_"))
        except Denied:  # only our own lanes' are seen; `check` says so
            pass
        await self._look(list(self.by_lane.values()))

    async def names(self) -> list[str]:
        """The names of all streams of the prefix. Raises: MirrorUnavailable."""
        names: list[str] = []
        while True:
            page = await self._client.api(
                "STREAM.NAMES", subject=subject_of(self._prefix, "*", "*"), offset=len(names)
            )
            found = page.get("streams") or []
            names += found
            if not found or len(names) >= page["total"]:  # others may take our subjects, too
                return [name for name in names if name.startswith(f"{self._prefix}_")]

    async def look(self) -> None:
        """Look at those in which something happens, and at the others as often as there is time.

        Raises: MirrorUnavailable: none can be seen.
        """
        now = time.monotonic()
        since = now - max(0.5, len(self.by_lane) / _LOOKS)
        await self._look(
            [stream for stream in self.by_lane.values()
             if (stream.active or stream.looked_at <= since)
             and now - stream.unseen_at >= _UNSEEN_S],
            _BRIEFLY_S,
        )  # fmt: skip

    async def _look(self, streams: Collection[Stream], unseen_s: float = ANSWER_S) -> None:
        """Args: unseen_s: how long to wait for one that could not be seen the last time."""
        several = asyncio.Semaphore(_LOOKS_AT_ONCE)

        async def one(stream: Stream) -> None:
            async with several:
                unseen = stream.unseen_at > -math.inf
                await self.look_at(stream, unseen_s if unseen else ANSWER_S)

        lately = time.monotonic() - _UNSEEN_S
        outcomes = await asyncio.gather(*map(one, streams), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                # one that can't be seen, as its leader is away, holds up its own lane alone
                alone = any(each.looked_at > lately for each in self.by_lane.values())
                if not (alone and isinstance(outcome, MirrorUnavailable)):
                    raise outcome

    async def look_at(self, stream: Stream, timeout_s: float = ANSWER_S) -> None:
        """Read one stream's state, if it is there. Raises: MirrorUnavailable."""
        stream.active = False
        began = stream.unseen_at = time.monotonic()
        try:
            filter = subject_of(self._prefix, stream.lane, "*")
            call = f"STREAM.INFO.{stream.name}"
            answer = await self._client.api(call, timeout_s=timeout_s, subjects_filter=filter)
            stream.saw(answer)
        except ApiError as exc:
            if exc.code != NO_STREAM:
                raise
            if stream.looked_at > began:  # it was made meanwhile
                return
            if stream.there:
                log.error("stream is gone", stream=stream.name, events=stream.events)
            stream.is_gone()
        stream.unseen_at = -math.inf

    # --- make ---

    async def ensure(self, lane: str, *, again: bool = False) -> Stream:
        """Once this returns, the lane's stream and its consumer are there; made if they were not.

        Args: again: look, even if they were there before.
        Raises: MirrorUnavailable; MirrorFull: the cluster has no room for it.
        """
        stream = self.of(lane)
        if stream.there and not again:
            return stream
        async with stream.making:
            if stream.there and not again:  # somebody else made it meanwhile
                return stream
            if (why := stream.full) is not None and not stream.there:
                raise MirrorFull(why)
            await self.look_at(stream)
            if not stream.there:
                await self._make(stream)
            await self._make_consumer(stream)
        return stream

    async def _make(self, stream: Stream) -> None:
        try:
            made = await self.create(stream_config(self._settings, stream.lane), _CREATE_S)
        except ApiError as exc:
            raise self._cant_make(stream, exc) from exc
        if made.get("did_create"):  # not another process at the same moment
            log.info("stream made", stream=stream.name, replicas=made["config"]["num_replicas"],
                     max_bytes=self._settings.nats_lane_max_bytes)  # fmt: skip
        await self.look_at(stream)

    async def create(self, config: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Make a stream with as many replicas as there can be; the answer of STREAM.CREATE.

        Raises: MirrorUnavailable, ApiError, Denied.
        """
        replicas = self._settings.nats_replicas or 3
        while True:
            try:
                return await self._client.api(
                    f"STREAM.CREATE.{config['name']}", timeout_s=timeout_s, **config,
                    num_replicas=replicas,
                )  # fmt: skip
            except ApiError as exc:
                fewer = self._fewer(exc, replicas)
                if fewer is None:
                    raise
                replicas = fewer

    def _fewer(self, exc: ApiError, replicas: int) -> int | None:
        """How many replicas to try next, where the setting leaves it open; None: it is no use.

        Only what says that there are no more nodes counts; one that is down is still one of them.
        """
        if self._settings.nats_replicas or replicas == 1:
            return None
        if exc.code == NOT_CLUSTERED:
            return 1
        bare = exc.detail.endswith(f"no suitable peers for placement ({NO_PEERS})")
        return replicas - 1 if bare else None

    def _cant_make(self, stream: Stream, exc: ApiError) -> MirrorUnavailable:
        # OTHER_CONFIG: somebody made it just now, with another configuration
        if exc.code in _PASSING:
            return MirrorUnavailable(exc.detail)
        wanted = self._settings.nats_lane_max_bytes
        why = (
            f"{exc.detail}: the stream {stream.name} can't be made; it reserves {wanted} bytes "
            "(nats_lane_max_bytes) on each node that is to store it (nats_replicas)"
        )
        stream.refuse(why, _REFUSED_S)
        log.error("stream not made", stream=stream.name, error=exc.detail, bytes=wanted)
        return MirrorFull(why)

    async def _make_consumer(self, stream: Stream) -> None:
        try:
            await self._client.api(f"CONSUMER.INFO.{stream.name}.{CONSUMER}")
        except ApiError as exc:
            if exc.code != NO_CONSUMER:
                raise
            await self._client.api(
                f"CONSUMER.CREATE.{stream.name}.{CONSUMER}", timeout_s=_CREATE_S,
                stream_name=stream.name, config=consumer_config(),
            )  # fmt: skip
