"""The IronMQ stand-in keeps the rules that the mirror relies on, and real clients agree with it.

Numbers such as 8.7 are sections of ironmq-v3.md, the notes on the IronMQ v3 HTTP contract.
"""

import asyncio
import gzip
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from tests.doubles.faults import Fault, What
from tests.doubles.ironmq import Clock, IronMQ

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STALE = "0" * 32
Answer = tuple[int, dict[str, Any]]


class Api:
    """Calls the stand-in over HTTP with nothing of ours in between."""

    def __init__(self, mq: IronMQ, http: aiohttp.ClientSession) -> None:
        self.mq = mq
        self.http = http

    async def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        headers = {"Authorization": f"OAuth {self.mq.token}"} | more.pop("headers", {})
        if body is not None:
            more["data"] = json.dumps(body)
        url = f"{self.mq.url}/3/projects/{self.mq.project_id}/{path}"
        async with self.http.request(method, url, headers=headers, **more) as response:
            return response.status, json.loads(await response.read())

    async def post(self, *bodies: str, delay: int = 0) -> list[str]:
        messages = [{"body": body, "delay": delay} for body in bodies]
        status, answer = await self("POST", "queues/q/messages", {"messages": messages})
        assert status == 201
        ids: list[str] = answer["ids"]
        return ids

    async def reserve(self, n: int = 1, **more: Any) -> list[dict[str, Any]]:
        status, answer = await self("POST", "queues/q/reservations", {"n": n, **more})
        assert status == 200
        messages: list[dict[str, Any]] = answer["messages"]
        return messages

    async def release(self, message: dict[str, Any], delay: int = 0) -> None:
        body = {"reservation_id": message["reservation_id"], "delay": delay}
        assert await self("POST", f"queues/q/messages/{message['id']}/release", body) == (
            200,
            {"msg": "Released"},
        )


def bodies(messages: list[dict[str, Any]]) -> list[str]:
    return [message["body"] for message in messages]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def mq(clock: Clock) -> AsyncIterator[IronMQ]:
    async with IronMQ(clock=clock) as mq:
        yield mq


@pytest.fixture
async def api(mq: IronMQ) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession() as http:
        yield Api(mq, http)


# -- transport: 2, 8.1, 8.14


@pytest.mark.parametrize(
    ("status", "headers", "query"),
    [
        (200, {}, ""),
        (200, {"Authorization": "none"}, "?oauth=stand-in-token"),
        (401, {"Authorization": "OAuth other"}, ""),
        (401, {"Authorization": "Bearer stand-in-token"}, ""),
        (401, {"Authorization": ""}, "?oauth=other"),
    ],
)
async def test_token(api: Api, status: int, headers: dict[str, str], query: str) -> None:
    got, answer = await api("GET", "queues" + query, headers=headers)
    assert got == status
    assert "msg" in answer or status == 200


async def test_unknown_project(api: Api) -> None:
    assert (await api("GET", "../5f00c0ffee00000000000002/queues"))[0] == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "queues/q"),
        ("PATCH", "queues/q"),
        ("DELETE", "queues/q"),
        ("POST", "queues/q/reservations"),
        ("GET", "queues/q/messages"),
        ("GET", "queues/q/messages/1"),
        ("DELETE", "queues/q/messages"),
        ("DELETE", "queues/q/messages/1"),
        ("POST", "queues/q/messages/1/touch"),
        ("POST", "queues/q/messages/1/release"),
    ],
)
async def test_absent_queue(api: Api, method: str, path: str) -> None:
    body = {"wait": 30} if path.endswith("reservations") else {}  # and does not wait for it
    assert await api(method, path, body) == (404, {"msg": "Queue not found"})


@pytest.mark.parametrize("path", ["queues/q/nothing", "nothing", "queues/q/messages/1/2/3"])
async def test_unknown_path(api: Api, path: str) -> None:
    assert (await api("POST", path, {}))[0] == 404


async def test_method_override(api: Api) -> None:
    [id] = await api.post("a")
    headers = {"X-HTTP-Method-Override": "DELETE"}
    assert (await api("POST", f"queues/q/messages/{id}", {}, headers=headers))[0] == 200
    assert api.mq.queue("q").size == 0


async def test_encoded_queue_name(api: Api) -> None:
    body = {"messages": [{"body": "a"}]}
    text = f"{api.mq.url}/3/projects/{api.mq.project_id}/queues/a%20b%2Fc/messages"
    url = URL(text, encoded=True)  # or the client would decode the slash
    headers = {"Authorization": f"OAuth {api.mq.token}"}
    async with api.http.post(url, json=body, headers=headers) as response:
        assert response.status == 201
    assert api.mq.queue("a b/c").bodies == ["a"]


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b'"a"', b"[" * 60_000])
async def test_request_is_a_json_object(api: Api, data: bytes) -> None:
    assert (await api("POST", "queues/q/messages", data=data))[0] == 400


async def test_request_size(api: Api) -> None:
    room = 65_536 - len(json.dumps({"messages": [{"body": ""}]}))
    exact = json.dumps({"messages": [{"body": "a" * room}]}).encode()
    assert len(exact) == 65_536
    assert (await api("POST", "queues/q/messages", data=exact))[0] == 201
    for data, headers in (
        (exact + b" ", {}),
        (gzip.compress(exact + b" "), {"Content-Encoding": "gzip"}),
        (io.BytesIO(exact * 17), {}),
    ):
        assert (await api("POST", "queues/q/messages", data=data, headers=headers))[0] == 400
    api.mq.rules.oversize_status = 413
    api.mq.rules.count_head = True
    assert (await api("POST", "queues/q/messages", data=exact))[0] == 413
    api.mq.rules.max_bytes = 262_144
    assert (await api("POST", "queues/q/messages", data=exact))[0] == 201
    assert api.mq.queue("q").size == 2


async def test_gzip_and_chunks(api: Api) -> None:
    data = json.dumps({"messages": [{"body": "åäö 中文 \0"}]}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 7):
            yield data[at : at + 7]

    assert (await api("POST", "queues/q/messages", data=pieces()))[0] == 201
    headers = {"Content-Encoding": "gzip"}
    assert (await api("POST", "queues/q/messages", data=gzip.compress(data), headers=headers))[
        0
    ] == 201
    assert bodies(await api.reserve(2)) == ["åäö 中文 \0"] * 2


# -- post: 5.6, 8.4, 8.5


async def test_post(api: Api) -> None:
    body = {"messages": [{"body": "a", "timeout": 9}, {"body": ""}], "oauth": "x"}
    status, answer = await api("POST", "queues/q/messages", body)
    assert (status, answer["msg"]) == (201, "Messages put on queue.")
    ids = answer["ids"] + await api.post("b")
    assert ids == sorted(set(ids))
    assert all(re.fullmatch(r"\d{19}", id) for id in ids)
    assert list(api.mq.queue("q").messages) == ids
    assert api.mq.queue("q").bodies == ["a", "", "b"]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        {"body": "a"},
        ["a"],
        [{}],
        [{"body": 1}],
        [{"body": None}],
        [{"body": "a"}, {"body": {}}],
        [{"body": "a", "delay": -1}],
        [{"body": "a", "delay": 604_801}],
        [{"body": "a", "delay": "5"}],
        [{"body": "a", "delay": True}],
        [{"body": "a", "delay": 1.5}],
        [{"body": "a"}] * 101,
    ],
)
async def test_post_refused_whole(api: Api, messages: Any) -> None:
    await api("PUT", "queues/q", {})
    assert (await api("POST", "queues/q/messages", {"messages": messages}))[0] == 400
    assert api.mq.queue("q").total_messages == 0


async def test_webhook(api: Api) -> None:
    url = f"{api.mq.url}/3/projects/{api.mq.project_id}/queues/q/webhook?oauth={api.mq.token}"
    async with api.http.post(url, data=b"not {json") as response:
        assert response.ok
    assert api.mq.queue("q").bodies == ["not {json"]


# -- reserve: 5.7, 8.3, 8.6


async def test_reserve(api: Api) -> None:
    ids = await api.post("a", "b", "c")
    messages = await api.reserve(2)
    assert [m["id"] for m in messages] == ids[:2]
    assert bodies(messages) == ["a", "b"]
    assert [m["reserved_count"] for m in messages] == [1, 1]
    assert all(re.fullmatch(r"[0-9a-f]{32}", m["reservation_id"]) for m in messages)
    assert messages[0]["reservation_id"] != messages[1]["reservation_id"]
    assert bodies(await api.reserve(100)) == ["c"]
    assert await api.reserve(100) == []


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"n": 0}),
        (400, {"n": 101}),
        (400, {"n": "1"}),
        (400, {"wait": 31}),
        (400, {"wait": -1}),
        (400, {"timeout": 86_401}),
        (400, {"timeout": -1}),
        (200, {"timeout": 0, "n": 100, "wait": 0}),
        (200, {"timeout": 5}),
        (200, {"timeout": None, "n": None}),
    ],
)
async def test_reserve_ranges(api: Api, status: int, body: dict[str, Any]) -> None:
    await api.post("a")
    assert (await api("POST", "queues/q/reservations", body))[0] == status


async def test_strict_timeout(api: Api) -> None:
    await api.post("a")
    api.mq.rules.strict_timeout = True
    for timeout, status in ((29, 400), (1, 400), (0, 200), (30, 200)):
        assert (await api("POST", "queues/q/reservations", {"timeout": timeout}))[0] == status


@pytest.mark.parametrize(("given", "lease"), [(None, 45), (0, 45), (5, 5), (120, 120)])
async def test_lease_ends(api: Api, clock: Clock, given: int | None, lease: int) -> None:
    await api("PUT", "queues/q", {"queue": {"message_timeout": 45}})
    await api.post("a")
    [first] = await api.reserve(timeout=given)
    clock.pass_(lease - 1)
    assert await api.reserve() == []
    clock.pass_(1)
    [second] = await api.reserve()
    assert second["reserved_count"] == 2
    assert second["reservation_id"] != first["reservation_id"]


@pytest.mark.parametrize(("front", "order"), [(True, "abcd"), (False, "cdab")])
@pytest.mark.parametrize("how", ["timeout", "release"])
async def test_returned_messages(api: Api, clock: Clock, front: bool, order: str, how: str) -> None:
    api.mq.rules.returned_to_front = front
    await api.post("a", "b", "c", "d")
    messages = await api.reserve(2, timeout=30)
    clock.pass_(30 if how == "timeout" else 1)
    if how == "release":
        for message in messages:
            await api.release(message)
    assert bodies(await api.reserve(4)) == list(order)


async def test_delayed_messages_come_by_the_time_they_appear(api: Api, clock: Clock) -> None:
    await api.post("late", delay=20)
    await api.post("early", delay=10)
    await api.post("now")
    clock.pass_(15)
    await api.post("after early")
    assert (await api("GET", "queues/q/messages?n=9"))[1]["messages"][0]["body"] == "now"
    clock.pass_(5)
    assert bodies(await api.reserve(9)) == ["now", "early", "after early", "late"]


async def test_reserve_and_delete(api: Api) -> None:
    await api.post("a")
    assert bodies(await api.reserve(delete=True, timeout=0)) == ["a"]
    assert api.mq.queue("q").size == 0


@pytest.mark.parametrize("arrives", ["posted", "delayed", "leased"])
async def test_wait_returns_with_the_message(api: Api, clock: Clock, arrives: str) -> None:
    await api("PUT", "queues/q", {})
    if arrives != "posted":
        await api.post("a", delay=5 if arrives == "delayed" else 0)
    if arrives == "leased":
        await api.reserve(timeout=5)
    poll = asyncio.create_task(api.reserve(10, wait=30))
    await api.mq.until(lambda: api.mq.requests["reserve"] == (2 if arrives == "leased" else 1))
    if arrives == "posted":
        await api.post("a", "b")
    else:
        clock.pass_(5)
    assert bodies(await poll) == (["a", "b"] if arrives == "posted" else ["a"])


async def test_wait_ends(api: Api, clock: Clock) -> None:
    await api("PUT", "queues/q", {})
    poll = asyncio.create_task(api.reserve(wait=3))
    await api.mq.until(lambda: api.mq.requests["reserve"] == 1)
    clock.pass_(2.9)
    await api("GET", "queues")
    assert not poll.done()
    clock.pass_(0.1)
    assert await poll == []


async def test_a_poll_that_was_given_up_reserves_nothing(api: Api) -> None:
    await api("PUT", "queues/q", {})
    poll = asyncio.create_task(api.reserve(wait=30))
    await api.mq.until(lambda: api.mq.requests["reserve"] == 1)
    poll.cancel()
    await api.mq.until(lambda: api.mq.connections == 0)
    await api.post("a")
    assert bodies(await api.reserve()) == ["a"]


# -- dead letters: 6.4, 8.6


async def test_dead_letters(api: Api, clock: Clock) -> None:
    setting = {"queue_name": "dead", "max_reservations": 2}
    await api("PUT", "queues/q", {"queue": {"dead_letter": setting, "message_expiration": 500}})
    [id] = await api.post("a")
    await api.post("b")
    for _ in range(2):
        [message] = await api.reserve()
        assert message["id"] == id
        await api.release(message)
    assert "dead" not in api.mq.queues
    clock.pass_(400)
    assert bodies(await api.reserve(2)) == ["b"]
    assert api.mq.queue("dead").messages[id].expires_at == clock.now + 604_800
    clock.pass_(200)  # older than its first queue would have kept it
    status, answer = await api("POST", "queues/dead/reservations", {})
    [message] = answer["messages"]
    assert (status, message["id"], message["reserved_count"]) == (200, id, 3)
    assert (await api("GET", "queues/q"))[1]["queue"]["dead_letter"] == setting
    _, answer = await api("PUT", "queues/q", {"queue": {"dead_letter": {"queue_name": ""}}})
    assert "dead_letter" not in answer["queue"]


# -- delete: 5.10 to 5.12, 8.7, 8.8


async def arrange(api: Api, clock: Clock, state: str) -> tuple[str, str]:
    """A message in that state, and the last reservation id it had."""
    [id] = await api.post("a", delay=60 if state == "delayed" else 0)
    if state in ("fresh", "delayed"):
        return id, ""
    [message] = await api.reserve(timeout=30)
    if state == "timed out":
        clock.pass_(30)
    elif state == "released":
        await api.release(message)
    elif state == "released with delay":
        await api.release(message, delay=30)
    elif state == "gone":
        body = {"reservation_id": message["reservation_id"]}
        assert await api("DELETE", f"queues/q/messages/{id}", body) == (200, {"msg": "Deleted"})
    elif state == "touched":
        body = {"reservation_id": message["reservation_id"]}
        assert (await api("POST", f"queues/q/messages/{id}/touch", body))[0] == 200
    return id, message["reservation_id"]


DELETES = [
    ("fresh", None, 200),
    ("fresh", "", 200),
    ("fresh", STALE, 403),
    ("delayed", None, 200),
    ("reserved", "own", 200),
    ("reserved", None, 403),
    ("reserved", "", 403),
    ("reserved", STALE, 403),
    ("timed out", "own", 403),
    ("timed out", None, 200),
    ("released", "own", 403),
    ("released with delay", "own", 403),
    ("released with delay", None, 200),
    ("touched", "own", 403),
    ("gone", "own", 404),
    ("gone", None, 404),
]


@pytest.mark.parametrize("bulk", [False, True], ids=["one", "many"])
@pytest.mark.parametrize(("state", "sent", "status"), DELETES)
async def test_delete(
    api: Api, clock: Clock, state: str, sent: str | None, status: int, bulk: bool
) -> None:
    id, own = await arrange(api, clock, state)
    body = {} if sent is None else {"reservation_id": own if sent == "own" else sent}
    size = api.mq.queue("q").size
    if bulk:
        got, _ = await api("DELETE", "queues/q/messages", {"ids": [body | {"id": id}]})
    else:
        got, _ = await api("DELETE", f"queues/q/messages/{id}", body)
    assert got == status
    assert api.mq.queue("q").size == size - (status == 200)


@pytest.mark.parametrize(("partial", "left"), [(False, "abc"), (True, "c")])
@pytest.mark.parametrize(("bad", "status"), [("reserved", 403), ("unknown", 404)])
async def test_delete_many_with_a_bad_entry(
    api: Api, partial: bool, left: str, bad: str, status: int
) -> None:
    api.mq.rules.bulk_partial = partial
    await api.post("c")
    await api.reserve()
    entries = [{"id": id} for id in await api.post("a", "b")]
    entries.insert(1, {"id": next(iter(api.mq.queue("q").messages)) if status == 403 else "7"})
    assert (await api("DELETE", "queues/q/messages", {"ids": entries}))[0] == status
    assert sorted(api.mq.queue("q").bodies) == list(left)


@pytest.mark.parametrize(
    ("rule", "body", "status", "left"),
    [
        ("clear", {}, 200, 0),
        ("clear", {"id": ["1"]}, 200, 0),  # misspelt is missing
        ("clear", {"ids": None}, 200, 0),
        ("clear", {"ids": []}, 200, 0),
        ("noop", {"ids": []}, 200, 2),
        ("reject", {"ids": []}, 400, 2),
        ("clear", {"ids": "1"}, 400, 2),
        ("clear", {"ids": ["1"]}, 400, 2),
        ("clear", {"ids": [{"id": "1"}] * 101}, 400, 2),
    ],
)
async def test_clear(api: Api, rule: Any, body: Any, status: int, left: int) -> None:
    api.mq.rules.empty_ids = rule
    await api.post("a", "b")
    await api.reserve()
    assert (await api("DELETE", "queues/q/messages", body))[0] == status
    assert api.mq.queue("q").size == left
    assert api.mq.queue("q").total_messages == 2
    assert len(await api.reserve(9)) == left // 2


async def test_clear_says_so(api: Api) -> None:
    await api.post("a")
    assert await api("DELETE", "queues/q/messages", {}) == (200, {"msg": "Cleared"})
    assert api.mq.requests["clear"] == 1
    assert api.mq.requests["delete_many"] == 0


# -- touch and release: 5.13, 5.14, 8.9


async def test_touch(api: Api, clock: Clock) -> None:
    await api.post("a")
    [message] = await api.reserve(timeout=100)
    path = f"queues/q/messages/{message['id']}/touch"
    old = {"reservation_id": message["reservation_id"]}
    status, answer = await api("POST", path, old)
    assert (status, answer["msg"]) == (200, "Touched")
    new = {"reservation_id": answer["reservation_id"]}
    assert new != old
    assert (await api("POST", path, old))[0] == 403
    assert api.mq.queue("q").messages[message["id"]].reserved_count == 2
    clock.pass_(59)  # the queue's 60, not the 100 of the reserve
    assert await api.reserve() == []
    clock.pass_(1)
    assert (await api("POST", path, new))[0] == 403
    assert bodies(await api.reserve()) == ["a"]


async def test_release_with_delay(api: Api, clock: Clock) -> None:
    await api.post("a", "b")
    [message] = await api.reserve()
    await api.release(message, delay=10)
    assert bodies(await api.reserve(9)) == ["b"]
    clock.pass_(10)
    [message] = await api.reserve(9)
    assert (message["body"], message["reserved_count"]) == ("a", 2)


@pytest.mark.parametrize("verb", ["touch", "release"])
@pytest.mark.parametrize(
    ("state", "status"),
    [("fresh", 403), ("reserved", 200), ("timed out", 403), ("released", 403), ("gone", 404)],
)
async def test_only_a_live_lease(
    api: Api, clock: Clock, verb: str, state: str, status: int
) -> None:
    id, own = await arrange(api, clock, state)
    body = {"reservation_id": own}
    assert (await api("POST", f"queues/q/messages/{id}/{verb}", body))[0] == status
    body = {"reservation_id": STALE}
    wrong = 404 if state == "gone" else 403
    assert (await api("POST", f"queues/q/messages/{id}/{verb}", body))[0] == wrong


# -- looking: 5.8, 5.9, 8.2, 8.10, 8.11


async def test_size_counts_all_states_until_expiry(api: Api, clock: Clock) -> None:
    await api("PUT", "queues/q", {"queue": {"message_expiration": 100}})
    await api.post("reserved", "ready")
    await api.post("delayed", delay=10)
    await api.reserve()
    info = (await api("GET", "queues/q"))[1]["queue"]
    assert (info["size"], info["total_messages"]) == (3, 3)
    clock.pass_(99)
    assert api.mq.queue("q").size == 3
    clock.pass_(1)
    info = (await api("GET", "queues/q"))[1]["queue"]
    assert (info["size"], info["total_messages"]) == (0, 3)
    assert await api.reserve() == []


async def test_peek_and_get(api: Api) -> None:
    [reserved, ready] = await api.post("reserved", "ready")
    await api.post("ready too")
    [delayed] = await api.post("delayed", delay=10)
    await api.reserve()
    for _ in range(2):  # looking changes nothing
        status, answer = await api("GET", "queues/q/messages?n=100")
        assert status == 200
        assert bodies(answer["messages"]) == ["ready", "ready too"]
    assert bodies((await api("GET", "queues/q/messages"))[1]["messages"]) == ["ready"]
    for id, body, count in (
        (reserved, "reserved", 1),
        (ready, "ready", 0),
        (delayed, "delayed", 0),
    ):
        message = {"id": id, "body": body, "reserved_count": count}
        assert await api("GET", f"queues/q/messages/{id}") == (200, {"message": message})
    assert (await api("GET", "queues/q/messages/7"))[1] == {"msg": "Message not found"}
    for n in ("0", "101", "x"):
        assert (await api("GET", f"queues/q/messages?n={n}"))[0] == 400
    assert bodies(await api.reserve(9)) == ["ready", "ready too"]


async def test_many_messages_stay_in_order(api: Api, clock: Clock) -> None:
    """Through reposts, touches, returns and deletions, which leave stale entries in the agendas."""
    ids = [id for _ in range(5) for id in await api.post(*map(str, range(100)))]
    assert api.mq.queue("q").bodies == [str(i) for _ in range(5) for i in range(100)]
    for _ in range(4):
        for message in await api.reserve(100):
            await api.release(message)
        await api.reserve(100)
        clock.pass_(60)
    for at in range(0, 300, 100):
        entries = [{"id": id} for id in ids[at : at + 100]]
        assert (await api("DELETE", "queues/q/messages", {"ids": entries}))[0] == 200
    await api.post("last")
    got = [m["id"] for _ in range(3) for m in await api.reserve(100)]
    assert got[:-1] == ids[300:]
    assert len(got) == 201


# -- queues: 5.1 to 5.5, 8.12


async def test_queue_settings(api: Api) -> None:
    view = {"project_id": api.mq.project_id, "name": "q", "type": "pull"}
    default = view | {"message_timeout": 60, "message_expiration": 604_800}
    assert await api("PUT", "queues/q", {}) == (200, {"queue": default})
    changed = default | {"message_timeout": 90}
    body = {"queue": {"message_timeout": 90}}
    assert await api("PUT", "queues/q", body) == (200, {"queue": changed})
    changed |= {"message_expiration": 2_592_000}
    body = {"queue": {"message_expiration": 2_592_000}}
    assert await api("PATCH", "queues/q", body) == (200, {"queue": changed})
    counters = {"size": 0, "total_messages": 0}
    assert await api("GET", "queues/q") == (200, {"queue": changed | counters})
    assert (await api("DELETE", "queues/q"))[0] == 200
    assert (await api("DELETE", "queues/q"))[0] == 404


@pytest.mark.parametrize(
    ("settings", "new", "existing"),
    [
        ({"type": "unicast"}, 400, 403),
        ({"type": "pull"}, 200, 200),
        ({"message_expiration": 2_592_001}, 400, 400),
        ({"message_expiration": 0}, 400, 400),
        ({"message_timeout": "60"}, 400, 400),
        ({"dead_letter": {"queue_name": "d", "max_reservations": 1001}}, 400, 400),
        ({"dead_letter": {"queue_name": "d", "max_reservations": 0}}, 400, 400),
        ({"dead_letter": {"max_reservations": 5}}, 400, 400),
        ({"unknown": 1}, 200, 200),
        ("text", 400, 400),
    ],
)
async def test_queue_settings_checked(api: Api, settings: Any, new: int, existing: int) -> None:
    assert (await api("PUT", "queues/q", {"queue": settings}))[0] == new
    assert ("q" in api.mq.queues) == (new == 200)
    await api("PUT", "queues/q", {})
    assert (await api("PUT", "queues/q", {"queue": settings}))[0] == existing


async def test_list(api: Api) -> None:
    for name in ("b", "a", "c", "ba"):
        await api("PUT", f"queues/{name}", {})
    for query, names in (
        ("", "a b ba c"),
        ("?prefix=b", "b ba"),
        ("?previous=b", "ba c"),
        ("?previous=aa&per_page=2", "b ba"),
        ("?previous=c", ""),
    ):
        expected = {"queues": [{"name": name} for name in names.split()]}
        assert await api("GET", "queues" + query) == (200, expected)
    for per_page in ("0", "101"):
        assert (await api("GET", f"queues?per_page={per_page}"))[0] == 400
    for i in range(40):
        await api("PUT", f"queues/z{i}", {})
    assert len((await api("GET", "queues"))[1]["queues"]) == 30


# -- faults: 8.13


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", ["408", "500", "503", "504", "reset"])
async def test_fault_instead_of_the_answer(api: Api, what: What, after: bool) -> None:
    api.mq.faults.next(what, 2, call="post", after=after)
    assert await api("GET", "queues") == (200, {"queues": []})  # not of that kind
    url = f"{api.mq.url}/3/projects/{api.mq.project_id}/queues/q/messages"
    headers = {"Authorization": f"OAuth {api.mq.token}"}
    body = {"messages": [{"body": "a"}]}
    for _ in range(2):
        if what == "reset":
            with pytest.raises(aiohttp.ClientOSError, match="reset by peer"):
                await api.http.post(url, json=body, headers=headers)
            continue
        async with api.http.post(url, json=body, headers=headers) as response:
            assert response.status == int(what)
            if what in ("503", "504"):
                assert response.content_type == "text/html"
                assert (await response.text()).startswith("<html>")
            else:
                assert "msg" in await response.json()
    assert api.mq.queue("q").size == (2 if after else 0)
    await api.post("b")
    assert api.mq.requests["post"] == 3


async def test_cut_slow_and_late_answers_have_taken_effect(api: Api) -> None:
    api.mq.faults.next("cut")
    with pytest.raises(aiohttp.ClientPayloadError):
        await api.post("a")
    for what in ("slow", "late"):
        api.mq.faults.next(what, seconds=0.1)
        before = time.monotonic()
        assert len(await api.post("a")) == 1
        assert time.monotonic() - before >= 0.1
        api.mq.faults.next(what, seconds=30)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await api.post("a")
    assert api.mq.queue("q").size == 5


async def test_latency(api: Api) -> None:
    api.mq.latency = 0.2
    before = time.monotonic()
    await asyncio.gather(*(api.post("a") for _ in range(10)))
    assert 0.2 <= time.monotonic() - before < 8 * 0.2
    assert api.mq.peak_connections == 10


async def test_duplicate_and_expire(api: Api) -> None:
    api.mq.faults.next("duplicate")
    await api("PUT", "queues/q", {})  # no post: leaves the order standing
    assert len(await api.post("a", "b")) == 2
    assert len(set(api.mq.queue("q").messages)) == 4
    [message, *_] = await api.reserve(4)
    api.mq.faults.next("expire", call="delete")
    body = {"reservation_id": message["reservation_id"]}
    assert (await api("DELETE", f"queues/q/messages/{message['id']}", body))[0] == 403
    assert bodies(await api.reserve(4)) == ["a", "b", "a", "b"]
    api.mq.expire_leases()
    assert len(await api.reserve(4)) == 4


async def test_rates_repeat_with_the_seed() -> None:
    async def run(seed: int) -> list[int]:
        async with IronMQ(seed=seed) as mq, aiohttp.ClientSession() as http:
            mq.faults.rate("500", 0.3)
            api = Api(mq, http)
            return [(await api("GET", "queues"))[0] for _ in range(100)]

    first = await run(1)
    assert first == await run(1) != await run(2)
    assert 10 < first.count(500) < 60


async def test_faults_come_in_order_and_end(api: Api) -> None:
    api.mq.faults.next("500", 2)
    api.mq.faults.next("408")
    assert [(await api("GET", "queues"))[0] for _ in range(4)] == [500, 500, 408, 200]
    api.mq.faults.rate("500", 1.0)
    assert (await api("GET", "queues"))[0] == 500
    api.mq.faults.clear()
    assert (await api("GET", "queues"))[0] == 200
    with pytest.raises(ValueError, match="no such fault"):
        Fault("nonsense")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "error"),
    [("closed", aiohttp.ClientConnectorError), ("reset", aiohttp.ClientOSError)],
)
async def test_away(api: Api, how: Any, error: type[Exception]) -> None:
    await api.post("a")
    await api("PUT", "queues/empty", {})
    poll = asyncio.create_task(api("POST", "queues/empty/reservations", {"wait": 30}))
    await api.mq.until(lambda: api.mq.requests["reserve"] == 1)
    await api("GET", "queues")
    assert api.mq.connections == 2  # one polls, one is idle: neither outlives the server's leave
    await api.mq.leave(how)
    with pytest.raises(aiohttp.ClientOSError):
        await poll
    await api.mq.until(lambda: api.mq.connections == 0)
    for _ in range(3):
        with pytest.raises(error):
            await api.post("b")
    assert api.mq.requests["post"] == (1 if how == "closed" else 4)
    await api.mq.come_back()
    await api.post("c")
    assert api.mq.queue("q").bodies == ["a", "c"]
    await api.mq.leave(how, back_after_s=0.05)
    await api.mq.until(lambda: api.mq.away is None)
    await api.post("d")


# -- the stand-in as a process


async def test_process() -> None:
    module = ("-m", "tests.doubles.ironmq", "--latency", "0.01")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *module, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        line = json.loads(await process.stdout.readline())
        mq = IronMQ(project_id=line["project_id"], token=line["token"])
        mq.port = int(line["url"].rpartition(":")[2])
        control = line["url"] + "/_control"
        async with aiohttp.ClientSession() as http:
            api = Api(mq, http)

            async def order(body: Any) -> Any:
                async with http.post(control, json=body) as response:
                    return response.status, await response.json()

            await api.post("a", "b")
            async with http.get(control) as response:
                told = await response.json()
            assert told["queues"] == {"q": 2}
            assert (told["requests"], told["total"]) == ({"post": 1}, 1)
            assert told["latency"] == 0.01
            await order({"faults": [{"what": "500"}], "latency": 0, "rules": {"max_post": 1}})
            assert (await api("GET", "queues"))[0] == 500
            two = {"messages": [{"body": "c"}] * 2}
            assert (await api("POST", "queues/q/messages", two))[0] == 400
            [message] = await api.reserve()
            await order({"expire_leases": True})
            assert bodies(await api.reserve()) == [message["body"]]
            assert (await order({"away": "reset"}))[1]["away"] == "reset"
            with pytest.raises(aiohttp.ClientConnectionError):
                await api.post("c")
            assert (await order({"away": None}))[1]["away"] is None
            await api.post("c")
            for wrong in ({"nonsense": 1}, {"away": "closed"}, {"faults": [{"what": "no"}]}):
                assert (await order(wrong))[0] == 400
            assert (await order({"away": "closed", "away_s": 0.3}))[0] == 200
        async with aiohttp.ClientSession() as http:
            api.http = http
            with pytest.raises(aiohttp.ClientConnectorError):
                await api.post("d")
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0


# -- real clients, each in a process of its own, called by lines of JSON

CACHE = ROOT / ".cache"
PYTHON_PINS = ["iron-mq==0.9", "iron-core==1.2.1"]  # they bring requests and python-dateutil
PYTHON_CALLS = """
import json, sys
from iron_mq import IronMQ

host, port, project_id, token = sys.argv[1:]
mq = IronMQ(protocol="http", host=host, port=port, project_id=project_id, token=token)
for line in sys.stdin:
    order = json.loads(line)
    target = mq if order["queue"] is None else mq.queue(order["queue"])
    try:
        told = {"ok": getattr(target, order["call"])(*order["args"])}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(told), flush=True)
"""


class Client:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, queue: str | None, call: str, *args: Any) -> Any:
        """What the client hands back, or "error: " and its message."""
        line = json.dumps({"queue": queue, "call": call, "args": args}) + "\n"
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line.encode())
        answer = await asyncio.wait_for(self._process.stdout.readline(), 20)
        assert answer, "the client's process ended"
        told = json.loads(answer)
        return f"error: {told['error']}" if "error" in told else told["ok"]


@asynccontextmanager
async def client_of(mq: IronMQ, *command: str | Path, **env: str) -> AsyncIterator[Client]:
    where = ("127.0.0.1", str(mq.port), mq.project_id, mq.token)
    pipe = asyncio.subprocess.PIPE
    env["HOME"] = str(CACHE)  # both read credentials there, which would be somebody's own
    process = await asyncio.create_subprocess_exec(
        *command, *where, stdin=pipe, stdout=pipe, cwd=CACHE, env=env
    )
    try:
        yield Client(process)
    finally:
        assert process.stdin
        process.stdin.close()
        await process.wait()


def installed(folder: Path, pins: str, *commands: list[str]) -> None:
    """Run the commands in the folder, unless they succeeded there with the same pins before."""
    done = folder / "installed"
    if done.exists() and done.read_text() == pins:
        return
    for command in commands:
        subprocess.run(command, cwd=folder, check=True)
    done.write_text(pins)


@pytest.fixture
async def real() -> AsyncIterator[IronMQ]:
    async with IronMQ() as mq:
        yield mq


@pytest.fixture
async def node(real: IronMQ) -> AsyncIterator[Client]:
    program = shutil.which("node")
    assert program, "the test of the official client needs Node.js and npm: install them"
    folder = CACHE / "node-ironmq"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / "node" / name, folder)
    lock = (folder / "package-lock.json").read_text()
    installed(folder, lock, ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"])
    modules = str(folder / "node_modules")
    async with client_of(real, program, HERE / "node" / "call.js", NODE_PATH=modules) as client:
        yield client


@pytest.fixture
async def python(real: IronMQ) -> AsyncIterator[Client]:
    folder = CACHE / "python-ironmq"
    folder.mkdir(parents=True, exist_ok=True)
    program = str(folder / "bin" / "python")
    pip = [program, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PYTHON_PINS]
    make = [sys.executable, "-m", "venv", "--clear", "."]
    installed(folder, " ".join(PYTHON_PINS), make, pip)
    async with client_of(real, program, "-c", PYTHON_CALLS) as client:
        yield client


async def test_node_client(node: Client, real: IronMQ) -> None:
    created = await node(None, "create_queue", "q", {"message_timeout": 90})
    assert created["queue"]["message_timeout"] == 90
    assert "size" not in created["queue"]
    one = await node("q", "post", "one")
    two, three = await node("q", "post", [{"body": "two", "delay": 0}, "three"])
    assert list(real.queue("q").messages) == [one, two, three]
    info = await node("q", "info")
    assert (info["name"], info["size"], info["total_messages"]) == ("q", 3, 3)
    assert (await node("q", "peek", {}))["id"] == one
    assert bodies(await node("q", "peek", {"n": 2})) == ["one", "two"]

    message = await node("q", "reserve", {"timeout": 60})
    old = message.pop("reservation_id")
    assert message == {"id": one, "body": "one", "reserved_count": 1}
    assert await node("q", "msg_get", one) == message
    touched = await node("q", "msg_touch", one, old, {"timeout": 60})
    assert touched["msg"] == "Touched"
    assert "error: Reservation" in await node("q", "del", one, {"reservation_id": old})
    released = await node("q", "msg_release", one, touched["reservation_id"], {"delay": 0})
    assert released == {"msg": "Released"}
    message = await node("q", "get", {})
    assert (message["id"], message["reserved_count"]) == (one, 3)
    body = {"reservation_id": message["reservation_id"]}
    assert await node("q", "del", one, body) == {"msg": "Deleted"}
    assert await node("q", "del", one, body) == "error: Message not found"

    [second] = await node("q", "get_n", {"n": 1})
    held = [{"id": two, "reservation_id": second["reservation_id"]}]
    assert "error: Reservation" in await node("q", "del_multiple", {"ids": [two, three]})
    assert await node("q", "del_multiple", {"reservation_ids": held}) == {"msg": "Deleted"}
    assert await node("q", "del_multiple", {"ids": [three]}) == {"msg": "Deleted"}
    assert await node("q", "reserve", {"n": 5}) == []
    await node("q", "post", ["four", "five"])
    assert await node("q", "clear") == {"msg": "Cleared"}
    assert real.queue("q").size == 0

    assert await node(None, "queues", {"prefix": "q"}) == [{"name": "q"}]
    updated = await node(None, "update_queue", "q", {"message_timeout": 45})
    assert updated["queue"]["message_timeout"] == 45
    assert await node("q", "del_queue") == {"msg": "Deleted."}
    assert await node("q", "reserve", {}) == "error: Queue not found"


async def test_node_client_in_trouble(node: Client, real: IronMQ) -> None:
    real.faults.next("503", 2)
    real.faults.next("408")
    assert await node("q", "post", "a") in real.queue("q").messages
    assert real.requests["post"] == 4
    real.faults.next("504")
    assert (await node("q", "post", "b")).startswith("error: <html>")
    real.faults.next("500")
    assert await node("q", "post", "c") == "error: Ordered fault"
    real.faults.next("reset", after=True)
    assert (await node("q", "post", "d")).startswith("error: ")
    assert real.queue("q").bodies == ["a", "d"]


async def test_python_client(python: Client, real: IronMQ) -> None:
    posted = await python("q", "post", "one", {"body": "två"}, "three")
    assert posted["msg"] == "Messages put on queue."
    one, two, three = posted["ids"]
    assert list(real.queue("q").messages) == [one, two, three]
    info = await python("q", "info")
    assert (info["name"], info["size"], info["project_id"]) == ("q", 3, real.project_id)
    assert (await python("q", "size"), await python("q", "total_messages")) == (3, 3)
    assert bodies((await python("q", "peek", 2))["messages"]) == ["one", "två"]
    assert (await python("q", "get_message_by_id", two))["body"] == "två"

    [message] = (await python("q", "reserve", 1, 60))["messages"]
    assert (message["id"], message["reserved_count"]) == (one, 1)
    touched = await python("q", "touch", one, message["reservation_id"], 60)
    assert touched["msg"] == "Touched"
    assert "403" in await python("q", "delete", one, message["reservation_id"])
    assert await python("q", "release", one, touched["reservation_id"]) == {"msg": "Released"}
    reserved = await python("q", "reserve", 2)
    assert bodies(reserved["messages"]) == ["one", "två"]
    own = reserved["messages"][0]["reservation_id"]
    assert await python("q", "delete", one, own) == {"msg": "Deleted"}
    assert "404" in await python("q", "delete", one, own)
    reserved["messages"] = reserved["messages"][1:]
    assert await python("q", "delete_multiple", None, reserved) == {"msg": "Deleted"}
    assert await python("q", "delete_multiple", [three]) == {"msg": "Deleted"}
    assert (await python("q", "reserve"))["messages"] == []
    await python("q", "post", "four")
    assert await python("q", "clear") == {"msg": "Cleared"}
    assert (await python("q", "update", {"message_timeout": 45}))["message_timeout"] == 45
    # written for Python 2's urllib: the one call that cannot work here
    assert "urlencode" in await python(None, "queues")
    assert await python("q", "delete_queue") == {"msg": "Deleted."}
    assert "404" in await python("q", "info")


async def test_python_client_in_trouble(python: Client, real: IronMQ) -> None:
    real.faults.next("503")
    posted = await python("q", "post", "a")
    assert posted["ids"] == list(real.queue("q").messages)
    assert real.requests["post"] == 2
    real.faults.next("reset")
    assert "ConnectionError" in await python("q", "post", "b")
    assert real.queue("q").bodies == ["a"]
