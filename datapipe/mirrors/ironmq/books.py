"""The books of this process: which messages in IronMQ are its own, and where they wait."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datapipe.events.segment import Segment
from datapipe.mirrors.ironmq.client import EXPIRATION_S

SOURCE = "ironmq"  # by this the ledger knows that a segment may come back for 31 days
LEASE_S = 30  # the shortest there is
LEASE_MAX_S = 120  # after that, and the next look, what a dead recoverer had reserved is free
ANEW_S = EXPIRATION_S * 0.8  # the age at which a message is posted anew
HELD_BYTES = 512  # what a message costs in memory though its rows are parked; measured, rounded up


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

    @classmethod
    def of(cls, id: str, segment: Segment, size: int, posted: float) -> Held:
        """A message that bears this segment."""
        return cls(
            id, segment.id, segment.events, size, len(segment.data), segment.created_at,
            posted + ANEW_S,
        )  # fmt: skip

    def lease(self, reservation: str, lease_s: int, now: float) -> None:
        self.reservation, self.lease_s, self.lease_until = reservation, lease_s, now + lease_s

    def entry(self, now: float) -> tuple[str, str | None]:
        """What a delete call takes; an expired lease counts as none."""
        return self.id, self.reservation if now < self.lease_until else None

    def never_anew(self) -> None:
        self.anew_at = math.inf


class Books:
    """See `recovery.Books`.

    Attributes:
        held: by queue and position.
        known: by segment; those that are not placed yet, too.
        undeleted: segments that are loaded while somebody has their message reserved; its queue.
        leases: by queue: for all that uses or makes reservation ids of what is held, since each
            touch makes the one before it worthless.
        given_up: something of ours may be stored that is not in the books.
        bytes: of the messages in `held`.
    """

    def __init__(self, process: str, prefix: str, clock: Callable[[], float]) -> None:
        self.process = process
        self.prefix = prefix
        self.clock = clock
        self.appending: set[str] = set()
        self.held: dict[str, dict[int, Held]] = {}
        self.known: dict[str, Held] = {}
        self.undeleted: dict[str, str] = {}
        self.leases: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.given_up = False
        self.bytes = 0
        self._positions = itertools.count(1)

    def queue_of(self, lane: str) -> str:
        return self.prefix + lane

    def message_of(self, segment: str) -> str | None:
        held = self.known.get(segment)
        return None if held is None else held.id

    def is_removed(self, segment: str) -> bool:
        return segment in self.undeleted

    def holds(self, held: Held) -> bool:
        """Whether it was not removed meanwhile."""
        return self.known.get(held.segment) is held

    def of_queue(self, queue: str) -> list[Held]:
        return list(self.held.get(queue, {}).values())

    def place(self, segments: Sequence[Segment]) -> None:
        """Give known segments their positions, at the moment when the buffer gets them."""
        for segment in segments:
            held = self.known[segment.id]
            segment.source, segment.position = SOURCE, next(self._positions)
            self.held.setdefault(self.queue_of(segment.lane), {})[segment.position] = held
            self.bytes += held.bytes

    def forget(self, queue: str, position: int) -> None:
        held = self.held[queue].pop(position)
        self.known.pop(held.segment, None)
        self.bytes -= held.bytes
