"""Named ingest keys: lanes, rates, counters; single events and batches, by both ways in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors import Appended
from tests.ways import KINDS, Way, one_way
from tests.wire import crash, lines, purchase

INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 1}
NAMELESS, UNKNOWN = {"user_id": 1}, {"event_name": "nope"}
KEYS = [
    "key",
    {"name": "ios", "key": "a", "lanes": ["install", "purchase"], "rate": 1e6},
    {"name": "ios", "key": "b", "lanes": ["install", "purchase"], "rate": 1e6},
    {"name": "web", "key": "w"},
]


class Answer(NamedTuple):
    status: int
    code: int
    json: dict[str, Any]
    retry_after: str | None


class Client:
    """Posts to one service."""

    def __init__(self, way: Way, session: aiohttp.ClientSession) -> None:
        self.pipeline = way.pipeline
        self._url = f"http://127.0.0.1:{way.port}"
        self._session = session

    async def post(self, body: object, key: str, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        given["Authorization"] = f"Bearer {key}"
        async with self._session.post(f"{self._url}/", data=data, headers=given) as response:
            answer = await response.json()
            again = response.headers.get("Retry-After")
            return Answer(response.status, answer["status_code"], answer, again)

    async def keys(self) -> dict[str, Any]:
        async with self._session.get(f"{self._url}/status.json") as response:
            keys: dict[str, Any] = (await response.json())["keys"]
            return keys

    async def text(self, path: str) -> str:
        async with self._session.get(f"{self._url}{path}") as response:
            return await response.text()


Make = Callable[..., Any]


@pytest.fixture(params=KINDS)
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes a service with these keys, and a client of it."""
    async with AsyncExitStack() as stack:

        async def make(*keys: object, **settings: Any) -> Client:
            given = {"mirror": "none", "ingest_keys": [*map(entry, keys or KEYS)], **settings}
            way = await stack.enter_async_context(one_way(request.param, tmp_path, **given))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Client(way, session)

        yield make


def entry(key: object) -> Any:
    from msgspec import convert

    from datapipe.settings import IngestKey

    return convert(key, IngestKey) if isinstance(key, dict) else key


def codes(answer: Answer) -> list[tuple[int, int]]:
    return [(error["index"], error["status_code"]) for error in answer.json["errors"]]


async def test_lanes(client: Make) -> None:
    """The type comes first, then the lane, then what else is wrong; a batch loses those alone."""
    at = await client()
    assert (await at.post(INSTALL, "a"))[:2] == (200, 0)
    for body in (crash(), crash(user_id="x"), {"event_name": "crash_report"}):
        answer = await at.post(body, "a")
        assert answer[:2] == (403, 8), body
        assert "'crash_report'" in answer.json["status_message"]
    assert (await at.post(UNKNOWN, "a"))[:2] == (400, 7)
    mixed = [INSTALL, crash(), UNKNOWN, purchase(), crash(user_id="x"), NAMELESS]
    for body in (mixed, lines(*mixed)):
        answer = await at.post(body, "b")
        assert answer[:2] == (207, 1)
        assert (answer.json["accepted"], answer.json["rejected"]) == (2, 4)
        assert codes(answer) == [(1, 8), (2, 7), (4, 8), (5, 4)]
    good = [INSTALL, crash(), purchase()]
    for body in (good, lines(*good)):
        assert codes(await at.post(body, "a")) == [(1, 8)]
    for body in ([crash(), crash()], lines(crash(), crash()), [crash(), UNKNOWN]):
        answer = await at.post(body, "a")
        assert (*answer[:2], answer.json["accepted"]) == (403, 8, 0), body
    assert (await at.post([UNKNOWN, crash()], "a"))[:2] == (400, 7)
    for key in ("key", "w"):
        assert (await at.post(crash(), key))[:2] == (200, 0)
    lanes = at.pipeline.buffer.lanes
    assert {name: lane.accepted for name, lane in lanes.items()} == {
        "install": 5, "purchase": 4, "crash_report": 2
    }  # fmt: skip


async def test_events_of_unknown_types_only_with_a_key_that_names_their_lane(client: Make) -> None:
    keys = [*KEYS, {"name": "all", "key": "u", "lanes": ["install", "datapipe_unknown"]}]
    at = await client(*keys, unknown_events="keep")
    for key, wanted in (("u", (200, 0)), ("key", (200, 0)), ("a", (403, 8)), ("w", (403, 8))):
        assert (await at.post(UNKNOWN, key))[:2] == wanted, key
        status = 200 if wanted[0] == 200 else 207
        assert (await at.post([INSTALL, UNKNOWN], key)).status == status, key


async def test_counters(client: Make) -> None:
    at = await client(*KEYS, {"name": "slow", "key": "s", "rate": 0.01})
    await at.post(INSTALL, "a")
    await at.post([INSTALL, INSTALL, crash()], "b")
    await at.post(b"{", "b")
    await at.post(INSTALL, "nope")
    await at.post(INSTALL, "key")
    for _ in range(3):
        await at.post([INSTALL] * 5, "s")
    keys = await at.keys()
    ios, slow = keys["ios"], keys["slow"]
    assert (ios["accepted"], ios["rejected"], ios["limited"]) == (3, 2, 0)
    assert (slow["accepted"], slow["rejected"], slow["limited"]) == (5, 0, 2)
    web = {"accepted": 0, "rejected": 0, "limited": 0, "last_seen": None}
    assert keys == {"ios": ios, "slow": slow, "web": web}
    assert ios["last_seen"][:10] == slow["last_seen"][:10]
    assert ios["last_seen"].endswith("Z")
    families = text_string_to_metric_families(await at.text("/metrics"))
    (family,) = [each for each in families if each.name == "datapipe_key_events"]
    samples = {(s.labels["key"], s.labels["outcome"]): s.value for s in family.samples}
    assert samples == {
        (name, outcome): key[outcome]
        for name, key in keys.items() for outcome in ("accepted", "rejected", "limited")
    }  # fmt: skip
    page = await at.text("/")
    assert page.count('role="rowheader">ios</th>') == 1
    reasons = at.pipeline.status.records.rejected
    assert (reasons["rate_limited"], reasons["forbidden"], reasons["unauthorized"]) == (2, 1, 1)
    assert [r["reason"] for r in at.pipeline.status.records.refusals()].count("rate_limited") == 1


async def test_a_rate(client: Make) -> None:
    """It comes behind 401 and before the body; all keys of the name share it."""
    slow = {"name": "ios", "rate": 0.5, "lanes": ["install"]}
    at = await client({**slow, "key": "a"}, {**slow, "key": "b"}, "c")
    for _ in range(5):  # ten seconds of the rate
        assert (await at.post(INSTALL, "a"))[:2] == (200, 0)
    answer = await at.post([INSTALL, INSTALL, UNKNOWN], "b")
    assert answer[:2] == (207, 1)
    for key, body in (("a", INSTALL), ("b", [INSTALL] * 3), ("a", b"{"), ("b", crash())):
        answer = await at.post(body, key)
        assert answer[:2] == (429, 11), body
        assert answer.retry_after is not None
        assert 1 <= int(answer.retry_after) <= 4
    assert "'ios'" in answer.json["status_message"]
    assert (await at.post(INSTALL, "nope"))[:2] == (401, 8)
    assert (await at.post(INSTALL, "c"))[:2] == (200, 0)


async def test_only_what_is_accepted_is_paid_for(
    client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = await client({"name": "ios", "key": "a", "rate": 0.1})

    async def away(_: object) -> Appended:
        return Appended(error=MirrorUnavailable("it is away"))

    with monkeypatch.context() as patch:
        patch.setattr(at.pipeline.buffer.mirror, "append", away)
        for body in (INSTALL, [INSTALL] * 50, INSTALL):
            assert (await at.post(body, "a"))[:2] == (503, 9)
    for body in (UNKNOWN, [UNKNOWN] * 50, b""):
        assert (await at.post(body, "a")).status == 400
    assert (await at.post(INSTALL, "a"))[:2] == (200, 0)
    assert (await at.keys())["ios"]["accepted"] == 1


async def test_a_key_that_is_replaced_keeps_the_scope_of_idempotency_keys(client: Make) -> None:
    at = await client()
    for key in ("a", "b", "w", "key"):
        assert (await at.post(INSTALL, key, Idempotency_Key="same"))[:2] == (200, 0)
    await at.pipeline.loader.load_now()
    books = at.pipeline.status.snapshot()["books"]
    assert (books["loaded"], books["duplicate"]) == (3, 1)


async def test_what_a_key_was_refused_is_taken_once_it_may(client: Make) -> None:
    """Sent again under the same idempotency key, after a reload that opens the lane."""
    ios = {"name": "ios", "key": "a"}
    at = await client({**ios, "lanes": ["install"]})
    for lanes, status in ((["install"], 207), (["install", "crash_report"], 200)):
        at.pipeline.keys.reload([entry({**ios, "lanes": lanes})])
        assert (await at.post([INSTALL, crash()], "a", Idempotency_Key="k")).status == status
        await at.pipeline.loader.load_now()
    books = at.pipeline.status.snapshot()["books"]
    assert (books["loaded"], books["duplicate"]) == (2, 1)


async def test_secrets_are_never_shown(client: Make) -> None:
    keys = [{"name": "ios", "key": "TOP-SECRET", "rate": 0.01, "lanes": ["install"]}]
    at = await client(*keys)
    answers = [await at.post(body, "TOP-SECRET") for body in (crash(), b"{", INSTALL, INSTALL, {})]
    assert {answer.status for answer in answers} == {403, 400, 200, 429}
    shown = [await at.text(path) for path in ("/", "/status.json", "/metrics", "/refused")]
    assert "TOP-SECRET" not in "".join([*shown, *map(str, answers), repr(at.pipeline.settings)])
