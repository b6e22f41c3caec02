"""Pipelines of requests, generated: good, odd and broken ones, cut anywhere into writes.

Each goes to both ways in (`tests.ways`), which must answer the same; nothing may be an internal
error or hang, and what was answered with 200 must be in the books.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import structlog
import uvloop
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

from datapipe.http import server
from tests.ways import LINGER_S, STATUS, Step, Talk, Way, both_ways
from tests.wire import crash, purchase

ROUND = 150  # pipelines, to two new services
_LOOPS = (uvloop.new_event_loop, asyncio.new_event_loop)
_SETTINGS = {
    "request_timeout": 1, "body_max_len": 3000, "batch_max_events": 5, "mirror_linger_ms": 1,
}  # fmt: skip
_LANES = ("crash_report", "purchase")
# whatever is not complete ends with this, as malformed
_END = (b"x" * 4000 + b"\r\n\r\n\r\n",) * 3
_ACCEPTED = re.compile(rb'{"status_code": 0, "status_message": "ok"}|"accepted": (\d+)')

_GOOD = json.dumps(crash()).encode()
_MIXED = _GOOD + b"\n{}\n" + _GOOD
_bodies = st.sampled_from(
    [_GOOD, _GOOD, json.dumps([crash(), purchase()]).encode(), _MIXED, b"", b"{",
     b"[]", b"\r\n\r\n", b"\0\xff", b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", _GOOD.ljust(2900),
     b" " * 3001, json.dumps([crash()] * 6).encode(), b"0\r\n\r\n"]
)  # fmt: skip
_good_lines = st.sampled_from([b"POST / HTTP/1.1"] * 6 + [b"POST /?key=a HTTP/1.1"])
_odd_lines = st.sampled_from(
    [b"GET /healthz HTTP/1.1", b"HEAD /healthz HTTP/1.1", b"GET /nope HTTP/1.1", b"PUT / HTTP/1.1",
     b"POST // HTTP/1.1", b"POST http://x/ HTTP/1.1", b"OPTIONS * HTTP/1.1", b"POST /#a HTTP/1.1",
     b"POST / HTTP/1.0", b"\r\nPOST / HTTP/1.1", b"POST  / HTTP/1.1", b"POST /?a=%zz HTTP/1.1"]
)  # fmt: skip
_broken_lines = st.sampled_from(
    [b"post / HTTP/1.1", b"POST / HTTP/2.0", b"POST /", b"", b"BREW / HTTP/1.1", b"POST / HTTP/0.9",
     b"PRI * HTTP/2.0", b"POST /\xff HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"POST * HTTP/1.1"]
)  # fmt: skip
_good_headers = st.sampled_from(
    [b"X-Request-ID: abc", b"X-Request-ID: d", b"Idempotency-Key: k1", b"idempotency-key: k2",
     b"Connection: keep-alive", b"User-Agent: x", b"Authorization: Bearer key", b"X-A:   b  ",
     b"Content-Type: a/b", b"Content-Encoding: identity"]
)  # fmt: skip
_odd_headers = st.sampled_from(
    [b"Connection: close", b"Proxy-Connection: close", b"Expect: 100-continue", b"X-A: \tb\t",
     b"X-A: \xe9", b"Upgrade: h2c", b"Idempotency-Key: a b", b"X-Request-ID: a/b", b"X-A:",
     b"Content-Encoding: br", b"Content-Encoding: gzip", b"Idempotency-Key: " + b"k" * 256,
     b"X-A: " + b"a" * 8180, b"Connection: keep-alive, close", b"Connection: x",
     b"Origin: https://a"]
)  # fmt: skip
_broken_headers = st.sampled_from(
    [b"X-A", b"X A: b", b" X-A: b", b"X-A: b\nX-B: c", b"X-A: \0", b": a", b"Host: y",
     b"Transfer-Encoding: gzip", b"Expect: x", b"Content-Length: 0", b"Content-Length: +1",
     b"Transfer-Encoding: chunked", b"X-A: " + b"a" * 8191, b"X-A: \r\n b", b"Content-Type: x",
     b"Sec-WebSocket-Key1: x", b"X-A: b\rX-B: c"]
)  # fmt: skip


# `_MIXED` alone is answered 207, and there are seeds that never draw it
_PARTLY: tuple[list[Step], bool] = (
    [b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(_MIXED) + _MIXED], True
)  # fmt: skip


def _chunks(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@st.composite
def _request(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A request, and whether its end is sure."""
    odd = draw(st.integers(0, 9))  # up to 5: a good one; up to 8: an odd one; else broken
    lines = [_good_lines, *[_odd_lines] * (odd > 5), *[_broken_lines] * (odd > 8)]
    headers = [_good_headers, *[_odd_headers] * (odd > 5), *[_broken_headers] * (odd > 8)]
    head = [draw(lines[-1] if draw(st.booleans()) else lines[0]), b"Host: localhost"]
    head += draw(st.lists(st.one_of(*headers), max_size=4))
    body = draw(_bodies)
    if odd > 5 and draw(st.booleans()):
        head.append(b"Transfer-Encoding: chunked")
        body = _chunks(body, draw(st.integers(1, 4000)))
    elif odd < 9 or draw(st.booleans()):
        head.insert(draw(st.integers(1, len(head))), b"Content-Length: %d" % len(body))
    if odd > 8 and draw(st.booleans()):
        body = body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=3))
    return b"\r\n".join([*head, b"", b""]) + body, odd < 9


@st.composite
def _pipelines(draw: st.DrawFn) -> tuple[list[Step], bool]:
    """What is sent piece by piece, and whether all of it is whole."""
    requests = draw(st.lists(_request(), min_size=1, max_size=6))
    data = b"".join(request for request, _ in requests)
    count = draw(st.sampled_from([0, 0, 1, 1, 2, 5, 20]))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), min_size=count, max_size=count)))
    pieces: list[Step] = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)]) if a < b]
    if draw(st.booleans()):  # answers have time to come in between
        pieces = [step for piece in pieces[:6] for step in (piece, 0.004)] + pieces[6:]
    return pieces, all(whole for _, whole in requests)


@dataclass(slots=True)
class Found:
    """What became of them."""

    pipelines: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    accepted: int = 0

    def __iadd__(self, other: Found) -> Found:
        self.pipelines += other.pipelines
        self.answers += other.answers
        self.accepted += other.accepted
        return self


def _alike(plain: Talk, other: Talk) -> bool:
    """Whether they are the same.

    One request may differ, the last, whose body is malformed: its reader may be quicker, and find
    something else that is wrong with it; if it is not, the request is not counted.
    """
    if plain.answers != other.answers:
        (before, _, last), (before_other, _, last_other) = [
            talk.answers.rpartition(b"HTTP/1.1 ") for talk in (plain, other)
        ]
        refused = last[:1] == last_other[:1] == b"4" and b"Connection: close" in last + last_other
        if before != before_other or not refused or plain.open or other.open:
            return False
    one, two = Counter(plain.counted), Counter(other.counted)
    accepted = all(one[lane] == two[lane] for lane in (*_LANES, "install"))
    return accepted and plain.open == other.open and ((one - two) + (two - one)).total() <= 1


async def send(ways: dict[str, Way], steps: list[Step], whole: bool) -> Found:
    """One pipeline, over both ways. AssertionError: they differ, or a 200 is not in the books."""
    sent = steps if whole else [*steps, *_END]
    talks = await asyncio.gather(*[way.talk(sent, probe=whole) for way in ways.values()])
    plain, other = talks
    assert _alike(plain, other), (steps, plain, other)
    assert b"text/plain" not in plain.answers, (steps, plain)
    lanes = sum(plain.counted.get(lane, 0) for lane in _LANES)
    answered = sum(int(found[1] or 1) for found in _ACCEPTED.finditer(plain.answers))
    assert answered == lanes, (steps, plain)
    statuses = Counter(status.decode() for status in STATUS.findall(plain.answers))
    assert not any(status >= "500" for status in statuses), (steps, plain)
    return Found(1, statuses, answered)


@contextmanager
def no_errors() -> Iterator[None]:
    """AssertionError: anything was logged as an error meanwhile."""
    records: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        exc = record.exc_info and record.exc_info[1]
        if not isinstance(exc, ConnectionError):  # aiohttp's, of a client that left before its 100
            records.append(f"{record.getMessage()}: {exc!r}")

    handler = logging.Handler(logging.ERROR)
    handler.emit = emit  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with structlog.testing.capture_logs() as logged:
            yield
    finally:
        logging.getLogger().removeHandler(handler)
    records += [str(line) for line in logged if line["log_level"] in ("error", "critical")]
    assert not records, records


def _round(folder: Path, count: int, number: int) -> Found:
    """So many pipelines to two new services; the number decides which."""
    found = Found()
    with asyncio.Runner(loop_factory=_LOOPS[number % len(_LOOPS)]) as loop:
        opened = both_ways(folder, **_SETTINGS)
        ways = loop.run(opened.__aenter__())
        try:

            @seed(number)
            @settings(
                max_examples=count, deadline=None, database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(_pipelines())
            @example(_PARTLY)
            def one(pipeline: tuple[list[Step], bool]) -> None:
                nonlocal found
                found += loop.run(send(ways, *pipeline))

            one()
            for way in ways.values():
                _, failed = loop.run(way.pipeline.loader.load_now())
                assert not failed, failed
                for lane in way.pipeline.buffer.lanes.values():
                    assert lane.accepted == lane.loaded + lane.duplicate, lane.name
        finally:
            loop.run(opened.__aexit__(None, None, None))
    return found


def run(seconds: float, number: int, count: int = ROUND) -> Found:
    """Rounds of `count` pipelines, and one that is always the same, until the time is over."""
    found, until = Found(), time.monotonic() + seconds
    for each in itertools.count(number):
        with (
            tempfile.TemporaryDirectory(prefix="datapipe-pipelines-", dir="/var/tmp") as folder,
            mock.patch.object(server, "_LINGER_S", LINGER_S),
        ):
            try:
                with no_errors():
                    found += _round(Path(folder), count, each)
            except BaseException as exc:
                exc.add_note(f"to repeat it: tests.fault.pipelines.run(0, {each}, {count})")
                raise
        if time.monotonic() > until:
            return found
    raise AssertionError
