"""Segment: the events of one lane that were made durable together, and its wire form."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from datapipe.events.types import Column

# What a segment costs in memory beside its rows: the object, its id, its place in two queues.
# Measured with tracemalloc, rounded up.
SEGMENT_OVERHEAD_BYTES = 1024

# In one load: so that booking them never holds up the event loop, however small they are.
SEGMENTS_AT_ONCE = 4096


class Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A run of rows of a POST that had an `Idempotency-Key`, whole in one segment.

    Attributes:
        claim: hash of ingest key and idempotency key.
        body: hash of the body.
        number: which run of the POST it is, within its lane.
        start, end: its bytes in the segment's data.
        events: how many rows.
    """

    claim: str
    body: str
    number: int
    start: int
    end: int
    events: int


class Chunk:
    """Rows of one lane from one POST, on their way into a segment.

    Attributes:
        claim: hash of the idempotency key, hash of the body, number of the part: such a chunk stays
            whole.
        indexes: where in the body its events stood.
    """

    __slots__ = ("claim", "columns", "data", "events", "indexes", "lane")

    def __init__(
        self,
        lane: str,
        columns: tuple[Column, ...],
        data: bytes,
        events: int,
        claim: tuple[str, str, int] | None = None,
        indexes: Sequence[int] = (0,),
    ) -> None:
        self.lane = lane
        self.columns = columns
        self.data = data
        self.events = events
        self.claim = claim
        self.indexes = indexes


class Head(msgspec.Struct, array_like=True, frozen=True):
    """All of a segment but its rows, as mirrors keep it."""

    version: int
    columns: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...] = ()


class Segment:
    """Events of one lane, as COPY rows. `id` is unique for ever; the ledger knows it.

    Attributes:
        columns: name and type of each value in a row, in order.
        data: the COPY rows, one line an event.
        created_at: when it was sealed, Unix time.
        parts: runs of rows with an idempotency key; rows outside of them have none.
        source, position: set by the mirror that holds it: where, and how far along.
        gone: the mirror has lost sight of it, so `data` is empty; whoever finds that the ledger
            knows it says false. Otherwise nothing of it that may come back is to be deleted.
    """

    __slots__ = (
        "columns", "created_at", "data", "events", "gone", "id", "lane",
        "parts", "position", "source",
    )  # fmt: skip

    def __init__(
        self,
        lane: str,
        columns: Sequence[Column],
        data: bytes,
        events: int,
        parts: tuple[Part, ...] = (),
        *,
        id: str | None = None,
        created_at: float | None = None,
        source: str = "",
        position: int = 0,
    ) -> None:
        self.created_at = time.time() if created_at is None else created_at
        self.id = id or f"{int(self.created_at * 1000):012x}{os.urandom(10).hex()}"
        self.lane = lane
        self.columns = tuple(columns)
        self.data = data
        self.events = events
        self.parts = parts
        self.source = source
        self.position = position
        self.gone = False

    @property
    def bytes(self) -> int:
        """What it costs in memory."""
        return len(self.data) + SEGMENT_OVERHEAD_BYTES

    def cut(self, at: int) -> tuple[Segment, Segment | None]:
        """In two, at the last row or part that ends at byte `at` or before; None: it has but one.

        The pieces are new segments: only one that was never sent may be cut.
        """
        ends = [part.end for part in self.parts]
        starts = {part.start for part in self.parts}
        cut = self.data.rfind(b"\n", 0, at) + 1
        inside = next((p for p in self.parts if p.start < cut < p.end), None)
        if inside is not None:
            cut = inside.start
        if cut == 0:
            cut = ends[0] if 0 in starts else self.data.index(b"\n") + 1
        if cut >= len(self.data):
            return self, None
        return self._piece(0, cut), self._piece(cut, len(self.data))

    def _piece(self, start: int, end: int) -> Segment:
        data = self.data[start:end]
        parts = tuple(
            msgspec.structs.replace(part, start=part.start - start, end=part.end - start)
            for part in self.parts
            if start <= part.start < end
        )
        return Segment(
            self.lane, self.columns, data, data.count(b"\n"), parts, created_at=self.created_at
        )

    def __repr__(self) -> str:
        return f"<Segment {self.id} {self.lane} events={self.events} bytes={len(self.data)}>"


def seal(chunks: Sequence[Chunk], max_bytes: int) -> list[Segment]:
    """Segments of one lane and at most `max_bytes` rows; a single event or part may be larger."""
    by_lane: dict[tuple[str, tuple[Column, ...]], list[Chunk]] = {}
    for chunk in chunks:
        by_lane.setdefault((chunk.lane, chunk.columns), []).append(chunk)
    segments = []
    for (lane, columns), of_lane in by_lane.items():
        if sum([len(chunk.data) for chunk in of_lane]) <= max_bytes:
            segments.append(_segment(lane, columns, of_lane))
            continue
        gathered: list[Chunk] = []
        room = max_bytes
        for chunk in of_lane:
            rest: Chunk | None = chunk
            while rest is not None:
                piece, rest = _fitting(rest, room, max_bytes)
                if len(piece.data) > room and gathered:
                    segments.append(_segment(lane, columns, gathered))
                    gathered, room = [], max_bytes
                gathered.append(piece)
                room -= len(piece.data)
        segments.append(_segment(lane, columns, gathered))
    return segments


def _fitting(chunk: Chunk, room: int, max_bytes: int) -> tuple[Chunk, Chunk | None]:
    """The rows of a chunk that fill the room, and the rest; whole where it may not be cut."""
    size = len(chunk.data)
    if size <= room or chunk.claim or (size <= max_bytes and room < max_bytes // 8):
        return chunk, None
    cut = chunk.data.rfind(b"\n", 0, max(room, 0)) + 1
    if cut == 0:  # not even one row fits: into a segment of its own start
        cut = chunk.data.rfind(b"\n", 0, max_bytes) + 1 or chunk.data.index(b"\n") + 1
    if cut == size:
        return chunk, None
    first = chunk.data[:cut]
    events = first.count(b"\n")
    return (
        Chunk(chunk.lane, chunk.columns, first, events),
        Chunk(chunk.lane, chunk.columns, chunk.data[cut:], chunk.events - events),
    )


def _segment(lane: str, columns: tuple[Column, ...], chunks: Sequence[Chunk]) -> Segment:
    parts, at = [], 0
    for chunk in chunks:
        end = at + len(chunk.data)
        if chunk.claim:
            parts.append(Part(*chunk.claim, at, end, chunk.events))
        at = end
    data = chunks[0].data if len(chunks) == 1 else b"".join([chunk.data for chunk in chunks])
    return Segment(lane, columns, data, sum([chunk.events for chunk in chunks]), tuple(parts))


def encode_head(segment: Segment) -> bytes:
    """The JSON of what a mirror must keep beside the rows."""
    return msgspec.json.encode(
        Head(1, tuple((c.name, c.type) for c in segment.columns), segment.parts)
    )


_HEAD: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Head)


def decode_head(text: bytes) -> Head:
    """Raises: ValueError: damaged, or of a version that this release does not know."""
    head = _HEAD.decode(text)
    if head.version != 1:
        raise ValueError(f"segment head of version {head.version}, this release reads 1")
    return head  # type: ignore[no-any-return]
