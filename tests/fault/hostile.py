"""Hostile bodies, generated: each goes in beside good events, in every form a body can have.

The service runs in this process, with a real PostgreSQL at its end: what is accepted must be a row.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from datapipe.app import PIPELINE, Pipeline, create_app
from datapipe.http import responses as answers
from datapipe.http.auth import Credentials
from datapipe.settings import Settings
from tests.databases import Server, execute

CORPUS = sorted((Path(__file__).parent.parent / "corpus").iterdir())
KINDS = ("int", "float", "str", "bool", "datetime", "date", "Decimal", "UUID", "dict", "list")
EVERYTHING = {"n": "int", **{f"a_{kind.lower()}": f"{kind}?" for kind in KINDS}}
_FIELDS = {
    "crash_report": ("user_id", "timestamp", "message"),
    "install": ("user_id", "timestamp"),
    "everything": tuple(EVERYTHING),
}
_GOOD = b'{"event_name": "purchase", "user_id": %d, "timestamp": 1, "sku": "good"}'

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**64), 2**64), st.floats(),
    st.text(max_size=30), st.text(st.characters(max_codepoint=0x20), max_size=10),
    st.sampled_from(["2024-02-30", "2024-02-29T24:00:00Z", "1e5", "\\N", "\\.", "-0", "\ud800"]),
    st.datetimes().map(str), st.decimals().map(str), st.uuids().map(str),
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=4),
    max_leaves=8,
)  # fmt: skip


# values that fit a column, or nearly: what is accepted must be a row
_fitting = {
    "str": st.text(max_size=40),
    "bool": st.booleans(),
    "float": st.floats() | st.floats(allow_nan=False, allow_infinity=False),
    "datetime": st.datetimes().map(str) | st.datetimes(timezones=st.timezones()).map(str),
    "date": st.dates().map(str),
    "decimal": st.decimals(allow_nan=False).map(str),
    "uuid": st.uuids().map(str),
    "dict": st.dictionaries(st.text(max_size=5), _values, max_size=4),
    "list": st.lists(_values, max_size=4),
}
_int64 = st.integers(-(2**63), 2**63 - 1)


def _fits(key: str) -> st.SearchStrategy[Any]:
    if key == "message":
        return _fitting["str"]
    return _fitting.get(key.removeprefix("a_"), _int64)


@st.composite
def _event(draw: st.DrawFn) -> bytes:
    name = draw(st.sampled_from(sorted(_FIELDS)))
    event: dict[str, Any] = {"event_name": name}
    for key in _FIELDS[name]:
        event[key] = draw(_fits(key))
    if draw(st.booleans()):  # and then something is wrong
        for key in draw(st.lists(st.sampled_from(_FIELDS[name]), max_size=2, unique=True)):
            event[key] = draw(_values)
        event.update(draw(st.dictionaries(st.text(max_size=5), _values, max_size=1)))
    return json.dumps(event, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    body = bytearray(draw(st.sampled_from(CORPUS)).read_bytes())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(body)


hostile = st.one_of(
    st.binary(max_size=200), _event(), _event(), _mutated(),
    st.sampled_from(CORPUS).map(Path.read_bytes),
    _values.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
)  # fmt: skip
forms = st.sampled_from(["alone", "alone", "line", "element", "gzip", "cut gzip", "wrong encoding"])


@dataclass(slots=True)
class Hostile:
    """What became of them."""

    bodies: int = 0
    accepted: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    good: int = 0
    loaded: int = 0
    dead: int = 0


class Run:
    """One service that takes them all."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.found = Hostile()
        self._pipeline = pipeline
        self._ids = itertools.count(1)

    async def post(self, body: bytes, encoding: str = "") -> tuple[int, dict[str, Any]]:
        headers = CIMultiDict({"Content-Encoding": encoding} if encoding else {})
        answer = await self._answer(headers, body)
        self.found.bodies += 1
        self.found.statuses[answer.status] = self.found.statuses.get(answer.status, 0) + 1
        content = json.loads(answer.response().body or b"{}")  # type: ignore[arg-type]
        assert answer.status < 500, (answer.status, content, body)
        if answer.status in (200, 207):
            self.found.accepted += content.get("accepted", 1)
        return answer.status, content

    async def _answer(self, headers: CIMultiDict[str], body: bytes) -> answers.Answer:
        """As a connection asks for it: at once, else by a closer look."""
        ingest = self._pipeline.ingest
        sent: asyncio.Future[answers.Answer] = asyncio.get_running_loop().create_future()
        if ingest.take(headers, Credentials(None), body, "id", sent.set_result):
            return await sent
        return await ingest.answer(headers, Credentials(None), body, "id")

    def good(self) -> bytes:
        self.found.good += 1
        return _GOOD % next(self._ids)

    async def send(self, body: bytes, form: str) -> None:
        """One hostile body, with good neighbours where the form has room for them."""
        if form == "line":
            inner = body.replace(b"\n", b" ")
            status, answer = await self.post(b"\n".join([self.good(), inner, self.good()]))
            assert status in (200, 207), (status, answer, inner)
            assert answer["accepted"] >= 2, (answer, inner)
        elif form == "element":
            status, answer = await self.post(b"[%b, %b, %b]" % (self.good(), body, self.good()))
            if status in (200, 207):
                assert answer["accepted"] >= 2, (answer, body)
            else:  # the array does not parse: refused as a whole
                self.found.good -= 2
        elif form == "gzip":
            await self.post(gzip.compress(body), "gzip")
        elif form == "cut gzip":
            await self.post(zlib.compress(body)[:-3], "deflate")
        elif form == "wrong encoding":
            await self.post(body, "gzip")
        else:
            await self.post(body)


def run(server: Server, count: int, number: int = 0) -> Hostile:
    """Send so many. AssertionError: an answer of 5xx, or a good neighbour was lost."""
    database = server.create_database()
    app = create_app(
        Settings(
            database_url=database, mirror="none", buffer_max_bytes=1 << 30,
            events={"everything": EVERYTHING}, log_level="critical", load_interval=3600,
        )
    )  # fmt: skip
    with asyncio.Runner() as loop:
        runner = web.AppRunner(app, handle_signals=False)
        loop.run(runner.setup())
        try:
            sent = Run(app[PIPELINE])

            @seed(number)
            @settings(
                max_examples=count, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(hostile, forms)
            def one(body: bytes, form: str) -> None:
                loop.run(sent.send(body, form))

            one()
            _, failed = loop.run(app[PIPELINE].loader.load_now())
            assert not failed, failed
            lanes = app[PIPELINE].buffer.lanes.values()
            sent.found.loaded = sum(lane.loaded for lane in lanes)
            sent.found.dead = sum(lane.dead for lane in lanes)
        finally:
            loop.run(runner.cleanup())
    found = sent.found
    assert (found.loaded, found.dead) == (found.accepted, 0), found
    ((rows, distinct),) = execute(
        database, "SELECT count(*), count(DISTINCT user_id) FROM purchase WHERE sku = 'good'"
    )
    assert rows == distinct == found.good, (rows, found)
    return found
