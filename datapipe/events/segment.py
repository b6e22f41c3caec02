"""Segment: the events of one lane that were made durable together, and its wire form."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from operator import attrgetter

import msgspec

from datapipe.events.types import Column

# What a segment costs in memory besides its rows: the object, its id, its place in two queues.
# Measured with tracemalloc, rounded up.
SEGMENT_OVERHEAD_BYTES = 1024

# In one load, so that however small they are, booking them takes 1.5 ms of the event loop at most,
# and putting them together no more of the interpreter lock.
SEGMENTS_AT_ONCE = 1024

_BEGINNING = attrgetter("start")


class Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A run of rows of a POST that had an `Idempotency-Key`, whole in one segment.

    They are of one `event_name`, and began within the same 16 KiB of the body. So what a part could
    hold depends on the body alone; of that, it may lack what was rejected. A release that does not
    know the last two fields passes over them.

    Attributes:
        claim: hash of ingest key and idempotency key.
        body: hash of the body.
        number: of the 16 KiB of the body.
        start, end: its bytes in the segment's data.
        events: how many rows.
        name: their `event_name`, where it is not the segment's lane.
        lacks: see `Chunk`.
    """

    claim: str
    body: str
    number: int
    start: int
    end: int
    events: int
    name: str = ""
    lacks: str = ""


class Chunk(msgspec.Struct, eq=False, gc=False):
    """Rows of one lane from one POST, on their way into a segment.

    Attributes:
        claim: hash of the idempotency key, hash of the body, number of the part: such a chunk stays
            whole.
        indexes: where in the body its events stood.
        name: see `Part`.
        lacks: which events of the part were rejected: bit n, of a number in base 16, stands for the
            n-th event of that name in that part of the body; empty: none. At most 255 characters.
        waiter: who waits for the load of these rows, if anybody: they get segments of their own.
    """

    lane: str
    columns: tuple[Column, ...]
    data: bytes
    events: int
    claim: tuple[str, str, int] | None = None
    indexes: Sequence[int] = (0,)
    name: str = ""
    lacks: str = ""
    waiter: object | None = None


@dataclass(slots=True, eq=False, repr=False)
class Segment:
    """Events of one lane, as rows. `id` is unique for ever; the ledger knows it.

    Attributes:
        columns: name and type of each value in a row, in order.
        data: the rows, one line an event.
        parts: runs of rows with an idempotency key, in order; rows outside of them have none.
        created_at: when it was sealed, Unix time.
        source, position: where the mirror that holds it keeps it; set by the mirror.
        neutral: times are in UTC and have no offset (see `types`); release 1.0 wrote one to each.
        missing: the mirror can no longer find it, so `data` is empty. Set to false once the ledger
            is found to know it; until then no copy of it that may turn up is to be deleted.
        waiter: see `Chunk`; no mirror keeps it.
    """

    lane: str
    columns: tuple[Column, ...]
    data: bytes
    events: int
    parts: tuple[Part, ...] = ()
    _: KW_ONLY
    id: str = ""
    created_at: float = field(default_factory=time.time)
    source: str = ""
    position: int = 0
    neutral: bool = False
    missing: bool = False
    waiter: object | None = None

    def __post_init__(self) -> None:
        if not self.id:
            self.id = f"{int(self.created_at * 1000):012x}{os.urandom(10).hex()}"

    @property
    def bytes(self) -> int:
        """What it costs in memory."""
        return len(self.data) + SEGMENT_OVERHEAD_BYTES

    def cut(self, at: int) -> tuple[Segment, Segment | None]:
        """In two, at the last row or part that ends at byte `at` or before; None: it has only one.

        The pieces are new segments: only one that was never sent may be cut.
        """
        end = self._end(0, at)
        if end == len(self.data):
            return self, None
        return self._piece(0, end), self._piece(end, len(self.data))

    def split(self, max_bytes: int) -> list[Segment]:
        """In pieces of at most `max_bytes`; a single row or part may be larger."""
        if len(self.data) <= max_bytes:
            return [self]
        pieces, start = [], 0
        while start < len(self.data):
            end = self._end(start, start + max_bytes)
            pieces.append(self._piece(start, end))
            start = end
        return pieces

    def _end(self, start: int, at: int) -> int:
        """Where a piece ends that begins at byte `start` and is to end at byte `at` or before."""
        end = max(self.data.rfind(b"\n", start, at) + 1, start)
        before = bisect_left(self.parts, max(end, start + 1), key=_BEGINNING)
        if before and (part := self.parts[before - 1]).end > end:  # it may not be cut there
            return part.start if part.start > start else part.end
        return end if end > start else self.data.index(b"\n", start) + 1

    def _piece(self, start: int, end: int) -> Segment:
        data = self.data[start:end]
        first, last = (bisect_left(self.parts, at, key=_BEGINNING) for at in (start, end))
        parts = tuple(
            msgspec.structs.replace(part, start=part.start - start, end=part.end - start)
            for part in self.parts[first:last]
        )
        return Segment(
            self.lane, self.columns, data, data.count(b"\n"), parts,
            created_at=self.created_at, neutral=self.neutral, waiter=self.waiter,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Segment {self.id} {self.lane} events={self.events} bytes={len(self.data)}>"


def seal(chunks: Sequence[Chunk], max_bytes: int) -> list[Segment]:
    """Segments of one lane and at most `max_bytes` rows; a single event or part may be larger."""
    by_lane: dict[tuple[str, int, object], list[Chunk]] = {}
    for chunk in chunks:
        # all of a type share their columns, whose hash would cost more than all else here
        by_lane.setdefault((chunk.lane, id(chunk.columns), chunk.waiter), []).append(chunk)
    return [
        segment for of_lane in by_lane.values() for segment in _joined(of_lane).split(max_bytes)
    ]


def _joined(chunks: Sequence[Chunk]) -> Segment:
    """Args: chunks: of one lane, with the same columns and waiter."""
    lane, columns = chunks[0].lane, chunks[0].columns
    parts, at = [], 0
    for chunk in chunks:
        end = at + len(chunk.data)
        if chunk.claim:
            parts.append(Part(*chunk.claim, at, end, chunk.events, chunk.name, chunk.lacks))
        at = end
    data = chunks[0].data if len(chunks) == 1 else b"".join([chunk.data for chunk in chunks])
    events = sum([chunk.events for chunk in chunks])
    return Segment(lane, columns, data, events, tuple(parts), neutral=True, waiter=chunks[0].waiter)


class Head(msgspec.Struct, array_like=True, frozen=True):
    """All of a segment but its rows, as mirrors keep it; release 1.0 ignores `neutral`."""

    version: int
    columns: tuple[Column, ...]
    parts: tuple[Part, ...] = ()
    neutral: bool = False


def encode_head(segment: Segment) -> bytes:
    """The JSON of what a mirror must keep besides the rows; of columns, name and type."""
    columns = [column[:2] for column in segment.columns]
    return msgspec.json.encode([1, columns, segment.parts, segment.neutral])


_HEAD = msgspec.json.Decoder(Head)


def decode_head(text: bytes) -> Head:
    """Raises: ValueError: damaged, or of a version that this release does not know."""
    head = _HEAD.decode(text)
    if head.version != 1:
        raise ValueError(f"batch of version {head.version}, this release reads 1")
    return head


def restored(
    head: Head, data: bytes, *, id: str, lane: str, events: int, created_at: float
) -> Segment:
    """The segment that a mirror stored as these; its place there is the mirror's to set."""
    return Segment(
        lane, head.columns, data, events, head.parts,
        id=id, created_at=created_at, neutral=head.neutral,
    )  # fmt: skip
