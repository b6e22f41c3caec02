"""The wire form of a segment in IronMQ: one message, a JSON object that can be read by hand.

    {"datapipe": 1, "segment": "...", "lane": "...", "sender": "...", "posted": 1795359267.1,
     "created": 1795359266.9, "events": 2, "columns": [["user_id", "bigint"], ...], "parts": [],
     "rows": "H4sI...", "neutral": true}

`rows` are the COPY rows, gzip and base64. With common tools: `jq -r .rows | base64 -d | gunzip`.
`sender` is the process that posted it and `posted` when (Unix time): by these a recoverer tells
whose a message is, and how old.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import zlib

import msgspec

from datapipe.events.segment import Head, Part, Segment, restored
from datapipe.events.types import Column

VERSION = 1
INLINE_BYTES = 4_096  # more is packed, and unpacked, in a thread
_MOST_PACKED = 1032  # deflate makes no byte of more


class Envelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of a message; see above."""

    datapipe: int
    segment: str
    lane: str
    sender: str
    posted: float
    created: float
    events: int
    columns: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    rows: str
    neutral: bool = False  # release 1.0 passes over it, and loses it where it posts a message anew


class Unreadable(ValueError):
    """A message that is damaged, or none of ours."""


_DECODER = msgspec.json.Decoder(Envelope)


def pack(segment: Segment, sender: str, posted: float) -> str:
    """The body of the message. Takes about 20 ms for 1 MiB of rows: not for the event loop."""
    rows = base64.b64encode(gzip.compress(segment.data, 6, mtime=0)).decode()
    envelope = Envelope(
        VERSION, segment.id, segment.lane, sender, posted, segment.created_at, segment.events,
        tuple((column.name, column.type) for column in segment.columns), segment.parts, rows,
        segment.neutral,
    )  # fmt: skip
    return msgspec.json.encode(envelope).decode()


def posted_anew(envelope: Envelope, posted: float) -> str:
    """The same message, as of now."""
    return msgspec.json.encode(msgspec.structs.replace(envelope, posted=posted)).decode()


async def unpacked(envelope: Envelope) -> Segment:
    """The segment of a message; a large one is unpacked in a thread. Raises: Unreadable."""
    if len(envelope.rows) <= INLINE_BYTES:
        return unpack(envelope)
    return await asyncio.to_thread(unpack, envelope)


def rows_bytes(envelope: Envelope) -> int:
    """How large the rows are once unpacked: gzip's last four bytes say so, unless it is damaged."""
    try:
        size = int.from_bytes(base64.b64decode(envelope.rows[-8:])[-4:], "little")
    except ValueError:
        return 0
    return min(size, len(envelope.rows) * _MOST_PACKED)


def envelope_of(body: str) -> Envelope:
    """The message without its rows unpacked. Raises: Unreadable."""
    try:
        envelope = _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise Unreadable(str(exc)) from None
    if envelope.datapipe != VERSION:
        raise Unreadable(f"wire form {envelope.datapipe}, this release reads {VERSION}")
    return envelope


def unpack(envelope: Envelope) -> Segment:
    """The segment of a message. Raises: Unreadable: its rows are damaged."""
    try:
        data = gzip.decompress(base64.b64decode(envelope.rows, validate=True))
    except (ValueError, EOFError, OSError, zlib.error) as exc:  # base64, gzip, zlib
        raise Unreadable(f"rows: {exc}") from None
    if data.count(b"\n") != envelope.events or (data and not data.endswith(b"\n")):
        raise Unreadable("rows: not as many as the message says")
    columns = tuple(Column(*column) for column in envelope.columns)
    return restored(
        Head(VERSION, columns, envelope.parts, envelope.neutral), data,
        id=envelope.segment, lane=envelope.lane, events=envelope.events,
        created_at=envelope.created,
    )  # fmt: skip
