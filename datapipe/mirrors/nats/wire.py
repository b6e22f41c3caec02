"""The form of a message: one segment.

subject  <prefix>.<lane>.<events>        so a stream's info tells how many events wait there
header   Nats-Msg-Id: <segment id>       JetStream stores it once within the duplicate window
payload  <time sealed> <head as JSON>\\n
         <rows>
"""

from __future__ import annotations

from collections.abc import Mapping

from datapipe.events.segment import Segment, decode_head, encode_head, restored

MSG_ID = "Nats-Msg-Id"


class Unreadable(Exception):
    """The message is not one of ours."""


def subject_of(prefix: str, lane: str, events: int | str) -> str:
    return f"{prefix}.{lane}.{events}"


def stream_of(prefix: str, lane: str) -> str:
    return f"{prefix}_{lane}"


def headers_of(prefix: str, segment: Segment) -> dict[str, str]:
    """With the stream's name, so that no other stream that takes the subject stores it unseen."""
    return {MSG_ID: segment.id, "Nats-Expected-Stream": stream_of(prefix, segment.lane)}


def encode(segment: Segment) -> bytes:
    """The payload."""
    sealed = repr(segment.created_at).encode()
    return b"%b %b\n%b" % (sealed, encode_head(segment), segment.data)


def source_of(prefix: str) -> str:
    """Of a segment, in the ledger too: each prefix has streams, and so a pruning, of its own."""
    return f"nats:{prefix}"


def decode(
    prefix: str, subject: str, headers: Mapping[str, str] | None, payload: bytes, position: int
) -> Segment:
    """The segment of a message. Args: position: its sequence in the stream. Raises: Unreadable."""
    try:
        lane, events = subject.removeprefix(f"{prefix}.").split(".")
        line, data = payload.split(b"\n", 1)
        sealed, head = line.split(b" ", 1)
        segment = restored(
            decode_head(head), data, id=(headers or {})[MSG_ID], lane=lane, events=int(events),
            created_at=float(sealed),
        )  # fmt: skip
    except (ValueError, KeyError) as exc:
        raise Unreadable(str(exc)) from exc
    segment.source, segment.position = source_of(prefix), position
    return segment
