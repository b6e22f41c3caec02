"""What the service tells, who may ask, and when it loads: contract sections 4, 6, 8 and 9."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import ask, crash, get, post, purchase, running

LANES = {"crash_report", "purchase", "install"}
BOOKS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting")
NUMBER = (int, float)

shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres
) -> AsyncIterator[Service]:
    """On loopback, without keys; loads only when told to."""
    async with running(
        tmp_path_factory.mktemp("status"), database_url=postgres.create_database()
    ) as service:
        yield service


@pytest.fixture
def later(postgres: Postgres) -> tuple[str, Callable[[], None]]:
    """The URL of a database that is not there yet, and what makes it."""
    name = f"later{uuid4().hex[:10]}"
    admin = postgres.url("postgres")
    return postgres.url(name), lambda: void(postgres.execute(admin, f"CREATE DATABASE {name}"))


def void(_: object) -> None:
    """For what is called for its effect."""


async def text(service: Service, path: str) -> str:
    async with service.session.get(f"{service.url}{path}") as response:
        assert response.status == 200
        return await response.text()


def balanced(status: dict[str, Any]) -> None:
    for books in (status["books"], *status["lanes"].values()):
        came = books["accepted"] + books["recovered"]
        went = books["loaded"] + books["duplicate"] + books["dead"]
        assert came == went + books["waiting"], books
    for lane in status["lanes"].values():
        assert lane["waiting"] == lane["in_memory"] + lane["parked"]
        assert min(lane[key] for key in ("waiting", "in_memory", "parked", "waiting_bytes")) >= 0
    for key in BOOKS:
        assert status["books"][key] == sum(lane[key] for lane in status["lanes"].values())
    assert status["books"]["balanced"] is True


# --- what it shows ---


def check_types(value: Any, shape: Any, place: str = "status") -> None:
    """A shape is a type, some types, or a dict of shapes; None among types allows null."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), place
        for key, inner in shape.items():
            assert key in value, f"{place}.{key}"
            check_types(value[key], inner, f"{place}.{key}")
    elif value is None:
        assert None in (shape if isinstance(shape, tuple) else ()), place
    else:
        kinds = tuple(kind for kind in (shape if isinstance(shape, tuple) else (shape,)) if kind)
        assert isinstance(value, kinds), (place, value)
        assert isinstance(value, bool) == (bool in kinds), (place, value)


LANE = {
    **dict.fromkeys(BOOKS, int), "in_memory": int, "parked": int, "waiting_bytes": int,
    "oldest_seconds": NUMBER, "blocked": (str, None),
}  # fmt: skip
SHAPE = {
    "version": str, "now": str, "uptime_seconds": NUMBER, "ready": bool, "processes": int,
    "summary": {"state": str, "text": str, "since": (str, None)},
    "books": {**dict.fromkeys(BOOKS, int), "balanced": bool},
    "lanes": dict.fromkeys(LANES, LANE),
    "rejected": dict,
    "mirror": {"kind": str, "up": bool, "error": (str, None), "bytes": int, "max_bytes": int,
               "requests": int},
    "database": {"up": bool, "error": (str, None), "version": str, "schema": str},
}  # fmt: skip


@shared
async def test_status_json(service: Service) -> None:
    await service.post([crash(), crash(), {"event_name": "nope"}])
    await service.load()
    await service.post(crash())
    status = await service.status()
    check_types(status, SHAPE)
    balanced(status)
    assert status["now"].endswith("Z")
    assert abs(datetime.fromisoformat(status["now"]).timestamp() - datetime.now().timestamp()) < 60
    assert (status["ready"], status["processes"]) == (True, 1)
    assert (status["summary"]["state"], status["summary"]["since"]) == ("healthy", None)
    assert status["rejected"]["unsupported_event"] >= 1
    mirror, database = status["mirror"], status["database"]
    assert (mirror["kind"], mirror["up"], mirror["max_bytes"]) == ("journal", True, 1 << 30)
    assert mirror["bytes"] > 0
    assert (database["up"], database["error"], database["schema"]) == (True, None, "public")
    assert re.fullmatch(r"\d+\.\d+", database["version"])
    lane = status["lanes"]["crash_report"]
    check_types(lane["last_load"], {"at": str, "rows": int, "seconds": NUMBER}, "last_load")
    datetime.fromisoformat(lane["last_load"]["at"])
    assert lane["last_load"]["rows"] >= 2
    assert (lane["waiting"], lane["in_memory"], lane["parked"]) == (1, 1, 0)
    assert 0 < lane["waiting_bytes"] < 200
    assert 0 <= lane["oldest_seconds"] < 60
    assert 0 < lane["next_load_seconds"] <= 3600
    quiet = status["lanes"]["install"]
    assert (quiet["oldest_seconds"], quiet["waiting_bytes"], quiet["last_load"]) == (0, 0, None)


LANE_COUNTERS = ("accepted", "recovered", "loaded", "duplicate", "dead", "replayed")
METRICS = {
    **{f"datapipe_events_{key}": ("counter", "lane") for key in LANE_COUNTERS},
    "datapipe_events_rejected": ("counter", "reason"),
    "datapipe_waiting_events": ("gauge", "lane"), "datapipe_parked_events": ("gauge", "lane"),
    "datapipe_waiting_bytes": ("gauge", ""), "datapipe_oldest_waiting_seconds": ("gauge", "lane"),
    "datapipe_lane_blocked": ("gauge", "lane"), "datapipe_load_seconds": ("histogram", ""),
    "datapipe_mirror_append_seconds": ("histogram", ""),
    "datapipe_request_seconds": ("histogram", ""),
    "datapipe_mirror_requests": ("counter", "call"), "datapipe_database_up": ("gauge", ""),
    "datapipe_mirror_up": ("gauge", ""), "datapipe_books_balanced": ("gauge", "lane"),
    "datapipe_mirror_bytes": ("gauge", ""), "datapipe_mirror_max_bytes": ("gauge", ""),
    "datapipe_mirror_used_ratio": ("gauge", ""),
    "datapipe_dead_letters": ("gauge", "lane"), "datapipe_build_info": ("gauge", "version"),
    "process_resident_memory_bytes": ("gauge", ""), "process_cpu_seconds": ("counter", ""),
    "process_open_fds": ("gauge", ""), "process_start_time_seconds": ("gauge", ""),
}  # fmt: skip
REASONS = {
    "no_content", "bad_json", "key_missing", "bad_value", "too_long", "unsupported_event",
    "unauthorized", "forbidden", "unsupported_encoding", "key_reused", "rate_limited", "busy",
    "timeout",
}  # fmt: skip


@shared
async def test_metrics(service: Service) -> None:
    await service.post([crash(), {}])
    await service.load()
    raw = await text(service, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(raw)}
    assert set(families) >= set(METRICS)
    for name, (kind, label) in METRICS.items():
        family = families[name]
        assert (family.type, bool(family.documentation)) == (kind, True), name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == ({label} if label else set()), name
        if label == "lane":
            assert {sample.labels["lane"] for sample in family.samples} == LANES, name
    rejected = families["datapipe_events_rejected"].samples
    assert {sample.labels["reason"] for sample in rejected} <= REASONS
    status = await service.status()
    for key in ("accepted", "loaded"):
        samples = families[f"datapipe_events_{key}"].samples
        assert {s.name for s in samples} == {f"datapipe_events_{key}_total"}
        assert {s.labels["lane"]: s.value for s in samples} == {
            lane: books[key] for lane, books in status["lanes"].items()
        }
    assert families["datapipe_database_up"].samples[0].value == 1
    assert families["datapipe_mirror_up"].samples[0].value == 1

    async def bytes_are_those_of_the_page() -> bool:  # what was loaded may just be being removed
        found = re.search(r"^datapipe_mirror_bytes (\S+)$", await text(service, "/metrics"), re.M)
        return bool(found) and float(found[1]) == (await service.status())["mirror"]["bytes"]

    await until(bytes_are_those_of_the_page)
    assert families["datapipe_mirror_max_bytes"].samples[0].value == 1 << 30
    assert {s.value for s in families["datapipe_books_balanced"].samples} == {1}
    counts = {s.name: s.value for s in families["datapipe_load_seconds"].samples}
    assert counts["datapipe_load_seconds_count"] >= 1


@shared
async def test_health(service: Service) -> None:
    for path in ("/healthz", "/readyz"):
        status, answer = await service.get(path)
        assert (status, answer["status_code"]) == (200, 0)


@shared
async def test_the_page_has_a_row_for_each_lane(service: Service) -> None:
    await service.load()
    await service.post([crash()] * 1234)
    async with service.session.get(f"{service.url}/") as response:
        assert response.content_type == "text/html"
        page = await response.text()
    rows = [re.sub(r"<[^>]*>", " ", row) for row in re.findall(r"(?s)<tr.*?</tr>", page)]
    for lane in LANES:
        found = [row for row in rows if re.search(rf"\b{lane}\b", row)]
        assert found
        if lane == "crash_report":
            assert "1234" in found[0].replace(",", "").replace("\u202f", "")


@shared
async def test_answers_bear_headers_that_keep_them_safe(service: Service) -> None:
    for path in ("/", "/status.json", "/nope"):
        async with service.session.get(f"{service.url}{path}") as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Referrer-Policy"] == "same-origin"
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy


def refs(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [ref for value in node.values() for ref in refs(value)]
    return [ref for value in node for ref in refs(value)] if isinstance(node, list) else []


@shared
async def test_openapi(service: Service) -> None:
    document = json.loads(await text(service, "/openapi.json"))
    assert document["openapi"].startswith("3.1.")
    assert {"title", "version"} <= set(document["info"])
    assert document["info"]["version"] == (await service.status())["version"]
    for ref in refs(document):
        node = document
        for step in ref.removeprefix("#/").split("/"):
            node = node[step]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert method in ("get", "post")
            assert operation["responses"]
            for status, response in operation["responses"].items():
                assert re.fullmatch(r"[1-5]\d\d|default", status)
                for step in response.get("$ref", "").split("/")[3:]:
                    response = document["components"]["responses"][step]
                assert response["description"]
            if method == "get":
                async with service.session.get(f"{service.url}{path}") as answered:
                    assert str(answered.status) in operation["responses"]
                    wanted = operation["responses"]["200"]["content"]
                    assert answered.content_type in wanted
    taken = document["paths"]["/"]["post"]
    statuses = {"200", "207", "400", "401", "408", "413", "415", "500", "503"}
    assert statuses <= set(taken["responses"])
    assert "requestBody" in taken
    for name in LANES:
        schema = document["components"]["schemas"][name]
        assert schema["type"] == "object"
        assert set(schema["required"]) == set(schema["properties"])
        assert schema["examples"]
        for example in schema["examples"]:
            assert set(example) == set(schema["properties"])
            status, answer = await service.post(example)
            assert (status, answer["status_code"]) == (200, 0), name


# --- who may ask ---

STATUS_PATHS = ("/", "/status.json", "/metrics")
OPEN_PATHS = ("/healthz", "/readyz", "/openapi.json")


def request(method: str, path: str, *headers: str) -> bytes:
    head = [f"{method} {path} HTTP/1.1", *headers, "Content-Length: 0", "", ""]
    return "\r\n".join(head).encode()


OWN = ["Host: 127.0.0.1:1", "Host: localhost", "Host: LOCALHOST:8080", "Host: [::1]:8080",
       "Host: 127.0.0.2"]  # fmt: skip
ALLOWED = [
    *[[host] for host in OWN],
    ["Host: localhost:80", "Origin: http://localhost:80"],
    ["Host: localhost", "Sec-Fetch-Site: same-origin"],
]
DENIED = [
    ["Host: evil.example"],
    ["Host: localhost.evil.example"],
    ["Host: 192.168.0.1"],
    ["Host: "],
    ["Host: 127.0.0.1.evil.example"],
    ["Host: localhost", "Origin: http://evil.example"],
    ["Host: localhost", "Origin: null"],
    ["Host: localhost:80", "Origin: http://localhost:81"],
    ["Host: localhost", "Sec-Fetch-Site: cross-site"],
    ["Host: localhost", "Sec-Fetch-Site: same-site"],
    ["Host: localhost", "Sec-Fetch-Site: same-origin", "Origin: http://evil.example"],
    ["Host: evil.example", "Origin: http://evil.example"],
]


@shared
@pytest.mark.parametrize("headers", ALLOWED, ids=" ".join)
async def test_without_an_admin_key_this_machine_may_act(
    service: Service, headers: list[str]
) -> None:
    answer = await ask(service, request("POST", "/load", *headers))
    assert answer.status == 200
    assert set(answer.json) == {"loaded", "failed"}


@shared
@pytest.mark.parametrize("headers", DENIED, ids=" ".join)
async def test_without_an_admin_key_others_may_not_act(
    service: Service, headers: list[str]
) -> None:
    await service.post(crash())
    before = (await service.status())["books"]["loaded"]
    answer = await ask(service, request("POST", "/load", *headers))
    assert (answer.status, answer.code != 0) == (403, True)
    assert (await service.status())["books"]["loaded"] == before
    assert (await ask(service, request("GET", "/status.json", *headers))).status == 200


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_with_an_admin_key(make_service: Callable[..., Service], database: str) -> None:
    key = "admin key \u00fc:x"
    service = await make_service(database_url=database, admin_key=key, ingest_keys=["in"]).start()
    good = [f"Authorization: {basic('anyone', key)}", f"Authorization: {basic('', key)}",
            f"Authorization: Bearer {key}", f"authorization: bearer {key}"]  # fmt: skip
    bad = [[], ["Authorization: Bearer nope"], [f"Authorization: {basic(key, '')}"],
           ["Authorization: Bearer in"], ["Authorization: Bearer "],
           [f"Authorization: Digest {key}"], ["Authorization: Basic %%%"]]  # fmt: skip
    asked = [("GET", path) for path in STATUS_PATHS] + [("POST", "/load")]
    for method, path in asked:
        for header in good:
            # from anywhere: who has the key may act
            headers = ("Host: public.example", header)
            answer = await ask(service, request(method, path, *headers), method=method)
            assert answer.status == 200, (path, header)
        for wrong in bad:
            headers = ("Host: localhost", *wrong)
            answer = await ask(service, request(method, path, *headers), method=method)
            assert answer.status == 401, (path, wrong)
            assert answer.code != 0
            challenge = answer.headers["www-authenticate"]
            assert re.findall(r"(\w+) realm=", challenge) == ["Basic", "Bearer"]
        query = await ask(service, request(method, f"{path}?key=admin", "Host: x"), method=method)
        assert query.status == 401
    for path in OPEN_PATHS:
        assert (await service.get(path))[0] == 200
    assert (await ask(service, post(b"{}", "Authorization: Bearer in"))).code == 4
    assert (await ask(service, post(b"{}", f"Authorization: {basic('', key)}"))).status == 401


async def test_not_on_loopback_nobody_may_act_without_an_admin_key(
    make_service: Callable[..., Service], database: str
) -> None:
    service = await make_service(database_url=database, host="0.0.0.0").start()
    answer = await ask(service, request("POST", "/load", "Host: localhost"))
    assert (answer.status, answer.code != 0) == (403, True)
    assert (await service.get("/status.json"))[0] == 200


# --- load now ---


@shared
async def test_load_now(service: Service) -> None:
    await service.load()
    assert await service.load() == {"loaded": {}, "failed": {}}
    await service.post([crash(), crash(), purchase()])
    assert await service.load("?lane=install") == {"loaded": {}, "failed": {}}
    assert await service.load("?lane=purchase") == {"loaded": {"purchase": 1}, "failed": {}}
    assert await service.load() == {"loaded": {"crash_report": 2}, "failed": {}}
    assert (await service.status())["books"]["waiting"] == 0


@shared
@pytest.mark.parametrize("query", ["?lane=nope", "?lane=", "?accept=life", "?lane=%00"])
async def test_load_now_what_is_not_there(service: Service, query: str) -> None:
    await service.post(crash())
    before = (await service.status())["books"]["loaded"]
    answer = await ask(service, request("POST", f"/load{query}", "Host: localhost"))
    assert (400 <= answer.status < 500, answer.code != 0) == (True, True)
    assert (await service.status())["books"]["loaded"] == before


async def test_load_now_while_the_database_is_away(
    make_service: Callable[..., Service], later: tuple[str, Callable[[], None]]
) -> None:
    url, create = later
    service = await make_service(database_url=url, load_interval=3600).start()
    await service.post([crash(), purchase()])
    answer = await service.load()
    assert answer["loaded"] == {}
    assert set(answer["failed"]) == {"crash_report", "purchase"}
    assert all(answer["failed"].values())
    status = await service.status()
    assert (status["database"]["up"], status["ready"]) == (False, True)
    assert status["database"]["error"]
    assert status["summary"]["state"] != "healthy"
    assert status["summary"]["since"]
    balanced(status)
    assert "datapipe_database_up 0" in await text(service, "/metrics")
    assert service.logged("database down")[0]["error"]
    for request in (get("/dead"), post(b'{"all": true}', target="/dead/drop")):
        letters = await ask(service, request)
        assert (letters.status, letters.code) == (503, 9), letters
    create()
    assert (await service.drained())["loaded"] == 2
    assert service.logged("database up")
    assert (await service.status())["summary"]["state"] == "healthy"


# --- the books ---


async def test_the_books_balance_at_every_look(
    make_service: Callable[..., Service], database: str
) -> None:
    service = await make_service(
        database_url=database, load_interval=0.2, load_min_interval=0, load_trigger_bytes=4000,
        buffer_max_bytes=30_000,
    ).start()  # fmt: skip
    posted = 0

    async def posts(client: int) -> None:
        nonlocal posted
        for i in range(60):
            key = {"Idempotency-Key": f"{client % 3}-{i}"} if client < 6 else {}
            batch = [crash("x" * 30), purchase(), {}]
            status, answer = await service.post(batch, headers=key)
            assert status == 207
            posted += answer["accepted"]

    working = asyncio.gather(*(posts(client) for client in range(8)))
    looks, seen = 0, 0
    while not working.done() or looks < 20:
        status = await service.status()
        balanced(status)
        assert status["books"]["accepted"] >= seen
        seen = status["books"]["accepted"]
        looks += 1
    await working
    books = await service.drained()
    assert books["accepted"] == posted == 8 * 60 * 2
    assert books["duplicate"] == 3 * 60 * 2
    sql = "SELECT (SELECT count(*) FROM crash_report), (SELECT count(*) FROM purchase)"
    assert Postgres.execute(database, sql) == [(300, 300)]
    assert books["loaded"] == 600


# --- when it loads ---


def load_times(service: Service, lane: str = "crash_report") -> list[float]:
    return [
        datetime.fromisoformat(line["timestamp"]).timestamp()
        for line in service.logged("segments loaded")
        if line["lane"] == lane
    ]


async def loaded_is(service: Service, rows: int, lane: str = "crash_report") -> None:
    async def reached() -> bool:
        return bool((await service.status())["lanes"][lane]["loaded"] >= rows)

    await until(reached, what=f"{rows} rows loaded")


async def test_load_interval(make_service: Callable[..., Service], database: str) -> None:
    interval = 1.5
    service = await make_service(
        database_url=database, load_interval=interval, load_min_interval=0
    ).start()
    for turn in range(1, 3):
        await service.post(crash())
        await loaded_is(service, turn)  # the next event comes right after the load
    gaps = [b - a for a, b in pairwise(load_times(service))]
    assert len(gaps) == 1
    assert all(interval * 0.95 < gap < interval + 1.5 for gap in gaps), gaps


async def test_load_trigger_bytes_and_load_min_interval(
    make_service: Callable[..., Service], database: str
) -> None:
    minimum = 0.8
    service = await make_service(
        database_url=database, load_interval=3600, load_min_interval=minimum,
        load_trigger_bytes=10_000,
    ).start()  # fmt: skip
    batch = [crash("x" * 100)] * 100
    await service.post([crash()])  # too few: waits
    for turn in range(1, 4):
        await service.post(batch)
        await loaded_is(service, turn * 100 + 1)
    times = load_times(service)
    turns = [times[0]] + [b for a, b in pairwise(times) if b - a > minimum / 2]
    gaps = [b - a for a, b in pairwise(turns)]
    assert len(turns) == 3, times
    assert all(minimum * 0.9 < gap < minimum + 1.5 for gap in gaps), gaps
    lane = (await service.status())["lanes"]["purchase"]
    assert lane["loaded"] == 0


async def test_half_of_the_buffer_loads_the_fullest_lane_at_once(
    make_service: Callable[..., Service], database: str
) -> None:
    service = await make_service(
        database_url=database, load_interval=3600, load_min_interval=3600, buffer_max_bytes=200_000
    ).start()
    for turn in (1, 2):
        await service.post([purchase("x" * 100)] * 50)
        await service.post([crash("x" * 1000)] * 50)
        assert (await service.status())["lanes"]["crash_report"]["loaded"] < turn * 120
        await service.post([crash("x" * 1000)] * 70)
        await loaded_is(service, turn * 120)
    assert (await service.status())["lanes"]["purchase"]["waiting"] == 100


# --- bounds ---


async def test_parking(
    make_service: Callable[..., Service], later: tuple[str, Callable[[], None]]
) -> None:
    """Above `buffer_max_bytes` events wait in the journal alone, and all of them are loaded."""
    url, create = later
    service = await make_service(database_url=url, buffer_max_bytes=60_000).start()
    for i in range(40):
        batch = [(crash, purchase)[n % 2]("x" * 200, i * 50 + n) for n in range(50)]
        assert (await service.post(batch))[0] == 200
    status = await service.status()
    balanced(status)
    assert (status["ready"], status["books"]["waiting"]) == (True, 2000)
    parked = sum(lane["parked"] for lane in status["lanes"].values())
    in_memory = sum(lane["in_memory"] for lane in status["lanes"].values())
    assert parked > 1500
    assert in_memory * 200 < 60_000
    assert "datapipe_parked_events" in await text(service, "/metrics")
    create()
    books = await service.drained()
    assert (books["loaded"], books["duplicate"], books["dead"]) == (2000, 0, 0)
    sql = "SELECT count(*), count(DISTINCT user_id), sum(user_id) FROM (SELECT user_id FROM"
    sql += " crash_report UNION ALL SELECT user_id FROM purchase) AS rows"
    assert Postgres.execute(url, sql) == [(2000, 2000, 1999 * 1000)]


async def test_a_full_journal_refuses_and_heals(
    make_service: Callable[..., Service], later: tuple[str, Callable[[], None]]
) -> None:
    url, create = later
    service = await make_service(database_url=url, journal_max_bytes=200_000).start()
    taken = 0
    while True:
        status, answer = await service.post([crash("x" * 500, taken + n) for n in range(10)])
        if status != 200:
            break
        taken += 10
        assert taken < 1000, "the journal has no end"
    answer = await ask(service, post(b"[" + b",".join([json.dumps(crash("x" * 500)).encode()] * 20)
                                     + b"]"))  # fmt: skip
    assert (answer.status, answer.code) == (503, 9)
    assert int(answer.headers["retry-after"]) >= 1
    assert "journal" in answer.json["status_message"]
    balanced(await service.status())
    assert (await service.status())["books"]["accepted"] == taken > 100
    assert (await service.status())["rejected"]["busy"] >= 1
    create()
    await service.drained()

    async def takes() -> bool:
        return (await service.post(crash("after", -1)))[0] == 200

    await until(takes, what="room again")
    await service.drained()
    sql = "SELECT count(*), count(DISTINCT user_id) FROM crash_report WHERE user_id >= 0"
    assert Postgres.execute(url, sql) == [(taken, taken)]
    assert (await service.get("/readyz"))[0] == 200


async def test_readyz_tells_that_the_journal_is_full(
    make_service: Callable[..., Service], later: tuple[str, Callable[[], None]]
) -> None:
    """200 if it would accept an event now, else 503 and the reason."""
    url, create = later
    service = await make_service(database_url=url, journal_max_bytes=70_000).start()
    for size in (500, 50, 1):  # to the brim
        while (await service.post(crash("x" * size)))[0] == 200:
            pass
    for path, why in (("/readyz", "full"), ("/dead", "the database can't do it now")):
        refused = await ask(service, get(path), method="GET")
        assert (refused.status, refused.code) == (503, 9)
        assert why in refused.json["status_message"]
        assert int(refused.headers["retry-after"]) >= 1
    assert (await service.status())["ready"] is False
    assert (await service.get("/healthz"))[0] == 200
    create()
    await service.drained()

    async def ready() -> bool:
        return (await service.get("/readyz"))[0] == 200

    await until(ready)


async def test_mirror_none(
    make_service: Callable[..., Service], later: tuple[str, Callable[[], None]]
) -> None:
    url, create = later
    service = await make_service(database_url=url, mirror="none", buffer_max_bytes=50_000).start()
    assert (await service.status())["mirror"]["kind"] == "none"
    taken = 0
    while (await service.post([crash("x" * 500, taken + n) for n in range(5)]))[0] == 200:
        taken += 5
        assert taken < 1000, "memory has no end"
    refused = await ask(service, post(json.dumps([crash("x" * 500)] * 20).encode()))
    assert (refused.status, refused.code) == (503, 9)
    assert int(refused.headers["retry-after"]) >= 1
    status = await service.status()
    balanced(status)
    assert (status["books"]["waiting"], status["lanes"]["crash_report"]["parked"]) == (taken, 0)
    assert taken * 500 < 50_000
    create()
    await service.drained()
    assert (await service.post(crash("last", -1)))[0] == 200
    assert await service.stop() == 0
    sql = "SELECT count(*), count(DISTINCT user_id) FROM crash_report"
    assert Postgres.execute(url, sql) == [(taken + 1, taken + 1)]


async def test_inflight_max_bytes(make_service: Callable[..., Service], database: str) -> None:
    service = await make_service(database_url=database, inflight_max_bytes=100_000).start()
    answer = await ask(service, post(json.dumps([crash("x" * 1000)] * 110).encode()))
    assert (answer.status, answer.code) == (503, 9)
    assert int(answer.headers["retry-after"]) >= 1
    for _ in range(20):  # what a request held is given back
        assert (await service.post([crash("x" * 1000)] * 30))[0] == 200


# --- secrets and logs ---


async def test_secrets_are_never_shown(make_service: Callable[..., Service]) -> None:
    secrets = ["Secret1admin", "Secret2ingest", "Secret3password", "Secret4token"]
    service = await make_service(
        database_url=f"postgresql://user:{secrets[2]}@127.0.0.1:{free_port()}/x",
        admin_key=secrets[0], ingest_keys=[secrets[1]], ironmq_token=secrets[3], mirror="journal",
        log_level="debug", load_interval=0.1,
    ).start()  # fmt: skip
    bearer = {"Authorization": f"Bearer {secrets[0]}"}
    shown = []
    await ask(service, post(json.dumps(crash()).encode(), target=f"/?key={secrets[1]}"))
    await ask(service, post(b"{", target=f"/nope?key={secrets[1]}"))
    await ask(service, post(b"{", f"Authorization: Bearer {secrets[1]}"))

    async def failed() -> bool:
        return bool(service.logged("load failed"))

    await until(failed)
    for path in (*STATUS_PATHS, *OPEN_PATHS, "/nope"):
        async with service.session.get(f"{service.url}{path}", headers=bearer) as response:
            shown.append(await response.text())
    async with service.session.post(f"{service.url}/load", headers=bearer) as response:
        shown.append(await response.text())
        assert "crash_report" in shown[-1]
    assert await service.stop() == 0
    everything = "\n".join([*shown, *service.raw])
    assert not [secret for secret in secrets if secret in everything]


async def test_logs(make_service: Callable[..., Service], database: str) -> None:
    service = await make_service(database_url=database, load_interval=3600).start()
    for _ in range(50):
        await service.post(crash())
    for _ in range(2):
        await service.post([crash(), purchase()])
        await service.load()
    await service.post([crash(), purchase()])
    await service.kill()
    await service.start()
    await service.drained()
    for request in (b"{", b"GARBAGE"):
        await service.post(request)
    await ask(service, b"GARBAGE\r\n\r\n")
    await service.post(crash())
    assert await service.stop() == 0
    assert len(service.lines) == len(service.raw), "each line is JSON"
    for line in service.lines:
        assert {"timestamp", "level", "logger", "event"} <= set(line), line
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() is not None
        assert line["timestamp"].endswith(("Z", "+00:00"))
        assert line["level"] in ("debug", "info", "warning", "error", "critical")
    events = [line["event"] for line in service.lines]
    wanted = {"listening": 2, "segments loaded": 7, "stopping": 1, "stopped": 1, "recovered": 2,
              "database up": 2}  # fmt: skip
    assert {phrase: events.count(phrase) for phrase in wanted} == wanted
    for line in service.logged("segments loaded"):
        assert line["lane"] in LANES
        assert isinstance(line["rows"], int)
        assert isinstance(line["seconds"], float)
    assert sum(line["rows"] for line in service.logged("segments loaded")) == 57
    assert {line["lane"] for line in service.logged("recovered")} == {"crash_report", "purchase"}
    assert len(service.lines) < 40, "no line per POST"


async def test_a_load_over_one_worker_does_not_starve_other_lanes(
    make_service: Callable[..., Service], database: str
) -> None:
    """A worker changes lane after each transaction."""
    service = await make_service(
        database_url=database, load_interval=3600, load_workers=1, load_trigger_bytes=20_000,
        load_min_interval=3600,
    ).start()  # fmt: skip
    await service.load()
    await service.post([crash("x" * 1000, n) for n in range(400)])
    await service.post(purchase())
    await asyncio.gather(service.load("?lane=crash_report"), service.load("?lane=purchase"))
    lanes = [line["lane"] for line in service.logged("segments loaded")]
    assert lanes.count("crash_report") >= 400 * 1000 // 20_000
    assert lanes.index("purchase") < len(lanes) // 2
