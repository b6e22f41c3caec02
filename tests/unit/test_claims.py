"""Claims: which body a key stands for, within bounds of time and memory."""

from __future__ import annotations

import asyncio
import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from multidict import CIMultiDict

from datapipe.errors import BufferFull, EventRejected, MirrorUnavailable, Reason
from datapipe.events.registry import load_registry
from datapipe.events.segment import Chunk
from datapipe.http.claims import CLAIM_BYTES, Claims
from datapipe.http.cors import Cors
from datapipe.http.ingest import Ingest
from datapipe.http.ingest_keys import IngestKeys
from datapipe.http.responses import Answer
from datapipe.pipeline.records import Records
from datapipe.settings import Settings

GOOD = {"event_name": "install", "user_id": 1, "timestamp": 2}


def known(claims: Claims, key: str) -> bool:
    try:
        claims.check((key, "another"))
    except EventRejected as refused:
        assert refused.reason is Reason.KEY_REUSED
        return True
    return False


def test_a_key_stands_for_one_body() -> None:
    claims = Claims(1 << 20, 60.0)
    claims.check(("k", "a"))  # a look alone enters nothing
    claims.enter(("k", "b"))
    claims.enter(("k", "b"))
    claims.enter(("l", "a"))
    with pytest.raises(EventRejected, match="a key of its own"):
        claims.check(("k", "a"))
    claims.check(("k", "b"))


def test_a_key_is_free_again_behind_its_window() -> None:
    now = 0.0
    claims = Claims(1 << 20, 60.0, lambda: now)
    claims.enter(("k", "a"))
    now = 50.0
    claims.enter(("k", "a"))  # another try
    now = 110.0
    assert known(claims, "k")
    now = 110.1
    assert not known(claims, "k")
    claims.enter(("k", "b"))
    claims.check(("k", "b"))
    assert known(claims, "k")


def test_the_oldest_go_first() -> None:
    claims = Claims(3 * CLAIM_BYTES, 60.0)
    for key in "abc":
        claims.enter((key, "body"))
    claims.enter(("a", "body"))
    claims.enter(("d", "body"))
    assert [key for key in "abcd" if known(claims, key)] == ["a", "c", "d"]


def test_no_memory_holds_none() -> None:
    claims = Claims(0, 60.0)
    claims.enter(("k", "a"))
    assert not known(claims, "k")


@pytest.mark.parametrize("max_bytes", [100_000, 300_000, 1_000_000, 1_700_000])
def test_a_full_table_takes_what_it_may(max_bytes: int) -> None:
    tracemalloc.start()
    try:
        claims = Claims(max_bytes, 60.0)
        for _ in range(2 * max_bytes // CLAIM_BYTES):
            claims.enter((os.urandom(16).hex(), os.urandom(16).hex()))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.5 * max_bytes < held <= max_bytes


class FakeBuffer:
    """Takes everything, unless `fails`: then, if `begins`, only once an append has begun."""

    def __init__(self, fails: Exception | None = None, *, begins: bool = False) -> None:
        self.stopping = False
        self.mirror = self
        self.fails = fails
        self._begins = begins

    def full(self, lanes: Sequence[str]) -> dict[str, str]:
        return {}

    def check(self, chunks: Sequence[Chunk]) -> None:
        if self.fails and not self._begins:
            raise self.fails

    def add(self, chunk: Chunk, done: Callable[[Exception | None], None]) -> None:
        self.check((chunk,))
        done(self.fails)

    async def append(self, chunks: Sequence[Chunk], wait: object = None) -> None:
        self.check(chunks)
        if self.fails:
            raise self.fails


class Posts:
    """POSTs of the key `k`, the short way if there is one, else the long one."""

    def __init__(self, buffer: FakeBuffer, *, long: bool = False, **settings: Any) -> None:
        given = Settings(mirror="none", **settings)
        records = Records()
        with_keys = IngestKeys([], records, ()), Cors([]), records
        self._ingest = Ingest(buffer, load_registry(given), given, *with_keys, [].append)  # type: ignore[arg-type]
        self._long = long

    async def __call__(self, body: Any, key: str = "k") -> tuple[int, int]:
        """Status, and code."""
        headers = CIMultiDict({"Idempotency-Key": key})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answers: list[Answer] = []
        took = not self._long and self._ingest.take(headers, None, data, "id", answers.append)
        if not took:
            answers.append(await self._ingest.answer(headers, None, data, "id"))
        (answer,) = answers
        return answer.status, json.loads(answer.body)["status_code"]


@pytest.mark.parametrize("long", [False, True])
async def test_another_body_under_a_key_is_refused(long: bool) -> None:
    post = Posts(FakeBuffer(), long=long)
    other = {**GOOD, "user_id": 2}
    assert await post(GOOD) == (200, 0)
    assert await post(GOOD) == (200, 0)
    for body in (other, [GOOD], [GOOD, other], b"not JSON", b""):
        assert await post(body) == (422, 10)
    assert await post(other, "another") == (200, 0)
    assert await post([GOOD, other], "batch") == (200, 0)
    assert await post([GOOD, other], "batch") == (200, 0)
    assert await post([other, GOOD], "batch") == (422, 10)


async def test_another_body_that_came_meanwhile_is_refused_too() -> None:
    """Of two that are checked at once, the one that is appended first claims the key."""
    post = Posts(FakeBuffer())
    large = [GOOD, *[{**GOOD, "user_id": "x" * 1000}] * 1000]  # others get a turn meanwhile
    assert await asyncio.gather(post(large), post(GOOD)) == [(422, 10), (200, 0)]


@pytest.mark.parametrize("long", [False, True])
async def test_who_stored_nothing_claims_no_key(long: bool) -> None:
    buffer = FakeBuffer(BufferFull("full"))
    post = Posts(buffer, long=long)
    assert await post(GOOD) == (503, 9)
    assert await post([5, {}]) == (400, 3)
    assert await post(b"not JSON") == (400, 3)
    buffer.fails = None
    assert await post([GOOD, GOOD]) == (200, 0)
    assert await post(GOOD) == (422, 10)


@pytest.mark.parametrize("long", [False, True])
async def test_who_may_have_stored_something_claims_the_key(long: bool) -> None:
    post = Posts(FakeBuffer(MirrorUnavailable("no answer"), begins=True), long=long)
    assert await post(GOOD) == (503, 9)
    assert await post(GOOD) == (503, 9)
    assert await post([GOOD]) == (422, 10)
