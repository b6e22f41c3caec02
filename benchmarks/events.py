"""The events that are sent: `crash_report` with random values, the same in every run."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

TABLE = "crash_report"
COLUMNS = '"user_id" bigint, "timestamp" bigint, "message" text, "received_at" timestamptz'
NAMES = '"user_id", "timestamp", "message", "received_at"'
_RECEIVED_AT = "2026-01-01 12:00:00.123456"


class Crash(NamedTuple):
    user_id: int
    timestamp: int
    message: str


def crashes(count: int, seed: int = 1) -> list[Crash]:
    """Values of `count` events; a message has some 30 characters."""
    values = random.Random(seed)
    return [
        Crash(
            values.randrange(1, 10**9),
            values.randrange(1_600_000_000, 1_800_000_000),
            f"signal {values.randrange(32)} at 0x{values.getrandbits(48):012x} (core)",
        )
        for _ in range(count)
    ]


def batches(events: int, count: int = 100) -> list[list[Crash]]:
    """So many different batches of so many events."""
    return [crashes(events, seed) for seed in range(count)]


def as_json(crash: Crash, event_name: str = TABLE) -> bytes:
    return msgspec.json.encode({"event_name": event_name, **crash._asdict()})


def as_array(batch: Sequence[Crash]) -> bytes:
    """The body of a batch."""
    return b"[%b]" % b",".join(map(as_json, batch))


def as_ndjson(batch: Sequence[Crash]) -> bytes:
    return b"".join(as_json(crash) + b"\n" for crash in batch)


def packed(body: bytes) -> bytes:
    """As a client would: gzip at its usual level."""
    return gzip.compress(body, 6, mtime=0)


def as_values(batch: Sequence[Crash]) -> list[tuple[int, int, str, str]]:
    """The same as `as_rows`, as a database API takes rows."""
    return [(*crash, _RECEIVED_AT) for crash in batch]


def as_rows(batch: Sequence[Crash]) -> bytes:
    """COPY rows, with the time of receipt that datapipe would add."""
    return "".join(f"{c[0]}\t{c[1]}\t{c[2]}\t{_RECEIVED_AT}\n" for c in batch).encode()
