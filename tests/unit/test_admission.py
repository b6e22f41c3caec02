"""What can't be taken now: too many bytes under way, a stop, a full lane."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from multidict import CIMultiDict

from datapipe.errors import BufferFull
from datapipe.events.registry import load_registry
from datapipe.events.segment import Chunk
from datapipe.http.admission import SMALL_BODY_BYTES, Admission, Reservation
from datapipe.http.auth import Credentials
from datapipe.http.body import read_body
from datapipe.http.cors import Cors
from datapipe.http.ingest import Ingest
from datapipe.http.ingest_keys import IngestKeys
from datapipe.pipeline.records import Records
from datapipe.settings import Settings

INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 2}
CRASH = {**INSTALL, "event_name": "crash_report", "message": "m"}
PURCHASE = {**INSTALL, "event_name": "purchase", "sku": "tea"}


class FakeBuffer:
    """Takes everything; also the mirror, in which some lanes are full."""

    def __init__(self, full: Iterable[str] = ()) -> None:
        self.stopping = False
        self.taken: list[Chunk] = []
        self.mirror = self
        self._full = set(full)

    def full(self, lanes: Iterable[str]) -> dict[str, str]:
        return dict.fromkeys(self._full & set(lanes), "it is full")

    def check(self, chunks: Sequence[Chunk]) -> None:
        pass

    async def append(self, chunks: Sequence[Chunk], wait: object = None) -> None:
        self.taken += chunks


def admission(max_bytes: int) -> Admission:
    return Admission(FakeBuffer(), max_bytes)  # type: ignore[arg-type]


def ingest(buffer: FakeBuffer) -> Ingest:
    settings = Settings(mirror="none")
    records = Records()
    keys, cors = IngestKeys([], records, ()), Cors([])
    return Ingest(buffer, load_registry(settings), settings, keys, cors, records, [].append)  # type: ignore[arg-type]


def test_a_quarter_is_kept_for_small_bodies() -> None:
    under_way = admission(4 * SMALL_BODY_BYTES)
    large, small, another = (Reservation(under_way) for _ in range(3))
    large.grow(3 * SMALL_BODY_BYTES)
    with pytest.raises(BufferFull):
        large.grow(1)
    small.grow(SMALL_BODY_BYTES - 1)
    with pytest.raises(BufferFull):
        another.grow(1)
    for each in (large, small, another):
        each.end()
    assert (under_way.bytes, under_way.requests) == (0, 0)


async def test_decompressed_bytes_count_as_well() -> None:
    reservation = Reservation(admission(100_000))
    headers = CIMultiDict({"Content-Encoding": "gzip"})
    with pytest.raises(BufferFull):
        await read_body(gzip.compress(b" " * 1_000_000), headers, Settings(), reservation)


async def test_at_a_stop_the_connection_ends_with_the_answer() -> None:
    buffer = FakeBuffer()
    buffer.stopping = True
    answer = await ingest(buffer).answer(
        CIMultiDict(), Credentials(None), json.dumps(INSTALL).encode(), "id"
    )
    assert (answer.status, json.loads(answer.body)["status_code"], answer.close) == (503, 9, True)
    assert int(answer.headers["Retry-After"]) >= 1
    assert buffer.taken == []


@pytest.mark.parametrize(
    ("events", "status", "busy", "taken"),
    [
        (INSTALL, 503, None, 0),
        ([INSTALL, INSTALL], 503, ["install"], 0),
        ([PURCHASE, INSTALL, {}, PURCHASE], 207, ["install"], 2),
        (PURCHASE, 200, None, 1),
    ],
)
async def test_a_full_lane_costs_its_own_events(
    events: Any, status: int, busy: list[str] | None, taken: int
) -> None:
    buffer = FakeBuffer(full=["install"])
    service = ingest(buffer)
    answer = await service.answer(
        CIMultiDict(), Credentials(None), json.dumps(events).encode(), "id"
    )
    content = json.loads(answer.body)
    assert (answer.status, content.get("busy")) == (status, busy)
    assert ("Retry-After" in answer.headers) == (status != 200)
    assert sum(chunk.events for chunk in buffer.taken) == taken
    indexes = [error["index"] for error in content.get("errors", [])]
    assert indexes == sorted(indexes)
    assert (service.admission.bytes, service.admission.requests) == (0, 0)


@pytest.mark.parametrize(
    ("events", "status", "busy"),
    [
        (INSTALL, 503, ["install"]),
        ([PURCHASE, INSTALL, {}, CRASH, PURCHASE], 503, ["crash_report", "install"]),
        ([PURCHASE, {}], 207, None),
    ],
)
async def test_with_a_key_a_post_is_taken_whole_or_not_at_all(
    events: Any, status: int, busy: list[str] | None
) -> None:
    buffer = FakeBuffer(full=["install", "crash_report"])
    headers = CIMultiDict({"Idempotency-Key": "k"})
    answer = await ingest(buffer).answer(headers, None, json.dumps(events).encode(), "id")
    content = json.loads(answer.body)
    assert (answer.status, content.get("busy")) == (status, busy)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert bool(buffer.taken) == (status == 207)
    if busy:
        assert content["status_code"] == 9
        assert ", ".join(busy) in content["status_message"]
