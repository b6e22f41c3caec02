"""`Prefer: wait`: POSTs that are answered once their events are loaded.

The services are in this process, their database in memory; nothing but a POST that waits has them
load anything.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from datapipe.errors import MirrorUnavailable, SinkUnavailable
from datapipe.mirrors import Appended
from datapipe.pipeline import waiters
from datapipe.sinks.transaction import Transaction
from tests.doubles.ironmq import IronMQ
from tests.jetstream import NatsCluster
from tests.service import until
from tests.ways import KINDS, Way, one_way
from tests.wire import crash, post, purchase

OK = {"status_code": 0, "status_message": "ok"}
NATS = {"nats_lane_max_bytes": 1 << 24, "database_url": "postgresql://127.0.0.1:1/x"}
Start = Callable[..., Any]


class Answer(NamedTuple):
    status: int
    said: dict[str, Any]
    applied: str | None
    seconds: float


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts services; the way is that of plain heads unless it is said."""
    async with AsyncExitStack() as stack:

        async def start(kind: str = "plain", folder: str = "0", **settings: Any) -> Way:
            settings = {"mirror": "none", "load_min_interval": 3600, **settings}
            return await stack.enter_async_context(one_way(kind, tmp_path / folder, **settings))

        yield start


async def ask(way: Way, body: object, *headers: str, target: str = "/") -> Answer:
    """What a POST is answered on a connection of its own."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", way.port)
    began = time.perf_counter()
    try:
        writer.write(post(data, *headers, target=target))
        async with asyncio.timeout(20):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            found = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
            said = json.loads(await reader.readexactly(int(found["Content-Length"])))
    finally:
        writer.transport.abort()
    seconds = time.perf_counter() - began
    return Answer(int(head.split()[1]), said, found.get("Preference-Applied"), seconds)


def rows(way: Way, lane: str = "crash_report") -> int:
    return len(way.database.lines[lane])


def idle(way: Way) -> bool:
    """Whether nobody waits, and nothing is left of those who did."""
    of = way.pipeline.buffer.waiters
    awaited = sum(lane.awaited for lane in way.pipeline.buffer.lanes.values())
    return not (of._waits or of._lanes or of.segments or awaited) and way.quiet


async def comes_true(holds: Callable[[], bool]) -> None:
    async def there() -> bool:
        return holds()

    await until(there, 10)


class Gate:
    """Loads of a service, which wait while it is shut, and fail with `error`."""

    def __init__(self, way: Way) -> None:
        self.open = asyncio.Event()
        self.loads: list[float] = []
        self.error: Exception | None = None
        sink: Any = way.pipeline.loader.sink
        load = sink.load

        async def gated(*args: Any, **more: Any) -> Any:
            self.loads.append(time.perf_counter())
            await self.open.wait()
            if self.error is not None:
                raise self.error
            return await load(*args, **more)

        sink.load = gated


# --- loaded ---


@pytest.fixture(params=["none", "journal", "parked", "ironmq", "nats"])
async def mirror(request: pytest.FixtureRequest, nats_prefix: str) -> AsyncIterator[dict[str, Any]]:
    """Settings of each mirror; `parked`: a journal, and no room in memory."""
    if request.param == "nats":
        node: NatsCluster = request.getfixturevalue("nats_node")
        yield {"nats_prefix": nats_prefix, **NATS, **node.settings}
    elif request.param == "ironmq":
        async with IronMQ() as mq:
            yield {"mirror": "ironmq", "ironmq_host": mq.host, "ironmq_token": mq.token,
                   "ironmq_project_id": mq.project_id}  # fmt: skip
    elif request.param == "parked":
        yield {"mirror": "journal", "buffer_max_bytes": 1}
    else:
        yield {"mirror": request.param}


async def test_it_is_loaded_once_it_is_said_to_be(start: Start, mirror: dict[str, Any]) -> None:
    way = await start(**mirror)
    way.database.checks["crash_report"] = lambda line: b"dead" not in line
    bodies = [[crash("dead"), crash("a")], crash("dead"), crash("a"), [crash(), purchase(), {}]]
    answers = await asyncio.gather(
        *(ask(way, body, "Prefer: wait=20") for body in bodies), ask(way, [crash("dead")] * 3)
    )
    batch = {**OK, "accepted": 2, "rejected": 0, "loaded": True, "dead": 1}
    assert answers[0][:3] == (200, batch, "wait=20")
    assert answers[1][:3] == (200, {**OK, "loaded": True, "dead": 1}, "wait=20")
    assert answers[2][:3] == (200, {**OK, "loaded": True, "dead": 0}, "wait=20")
    status, said, applied, _ = answers[3]
    assert (status, said["accepted"], said["rejected"], applied) == (207, 2, 1, "wait=20")
    assert (said["loaded"], said["dead"]) == (True, 0)
    assert answers[4][:3] == (200, {**OK, "accepted": 3, "rejected": 0}, None)
    assert (await ask(way, crash("last"), "Prefer: wait=20")).said["loaded"]
    assert b"last" in way.database.lines["crash_report"][-1]
    assert idle(way)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["/", "/v1/events"])
async def test_either_way_and_path(start: Start, kind: str, target: str) -> None:
    way = await start(kind)
    alone = await ask(way, crash(), 'prefer: respond-async, WAIT="99"', target=target)
    assert alone[:3] == (200, {**OK, "loaded": True, "dead": 0}, "wait=25")
    assert rows(way) == 1
    assert (await ask(way, crash(), "Prefer: wait=soon", target=target))[:3] == (200, OK, None)
    refused = await ask(way, {}, "Prefer: wait=10", target=target)
    assert (refused.status, refused.applied, "loaded" in refused.said) == (400, None, False)
    assert idle(way)


async def test_it_takes_no_longer_than_its_load(start: Start) -> None:
    way = await start()
    assert (await ask(way, crash(), "Prefer: wait=20")).seconds < 2


async def test_what_takes_several_loads_is_loaded_after_the_last(start: Start) -> None:
    way = await start(load_trigger_bytes=2000)
    gate = Gate(way)
    body = [crash("x" * 900) for _ in range(10)]
    asking = asyncio.create_task(ask(way, body, "Prefer: wait=20"))
    await comes_true(lambda: bool(gate.loads))
    gate.open.set()
    answer = await asking
    assert (answer.status, answer.said["loaded"], rows(way)) == (200, True, 10)
    assert len(gate.loads) > 3
    assert idle(way)


async def test_what_is_sent_again_is_loaded_already(start: Start) -> None:
    way = await start()
    big = [crash("x" * 900, n) for n in range(100)]  # in several parts
    for _ in range(2):
        answer = await ask(way, big, "Idempotency-Key: k", "Prefer: wait=20")
        assert (answer.status, answer.said["loaded"], answer.said["dead"]) == (200, True, 0)
        assert rows(way) == 100


async def test_a_commit_whose_answer_was_lost(start: Start) -> None:
    way = await start()
    way.database.checks["crash_report"] = lambda line: b"dead" not in line
    sink: Any = way.pipeline.loader.sink
    transact, lost = sink.transact, [True]

    async def loses(lane: str, work: Callable[[Transaction], object]) -> object:
        result = await transact(lane, work)
        if lane == "crash_report" and lost:
            lost.pop()
            raise SinkUnavailable("the connection was lost", everywhere=False)
        return result

    sink.transact = loses
    answer = await ask(way, [crash("dead"), crash()], "Prefer: wait=20")
    assert (answer.status, answer.said["loaded"], answer.said["dead"]) == (200, True, 1)
    assert (lost, rows(way), len(way.database.letters)) == ([], 1, 1)


async def test_a_crowd_shares_loads(start: Start) -> None:
    """Each client asks again and again; a load of the lane begins each 0.1 s at the most."""
    way = await start(mirror="journal")
    gate = Gate(way)
    gate.open.set()
    until_s = time.perf_counter() + 1.0
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < until_s:
            answers.append(await ask(way, crash(), "Prefer: wait=20"))

    await asyncio.gather(*(client() for _ in range(40)))
    assert {answer.status for answer in answers} == {200}
    gaps = [b - a for a, b in zip(gate.loads, gate.loads[1:], strict=False)]
    assert all(gap > 0.09 for gap in gaps)
    assert rows(way) == len(answers) >= 4 * len(gate.loads)
    assert idle(way)


async def test_another_process_loads_it(
    start: Start, nats_node: NatsCluster, nats_prefix: str
) -> None:
    nats = {"nats_prefix": nats_prefix, **NATS, **nats_node.settings}
    one = await start(folder="one", **nats)
    one.database.checks["crash_report"] = lambda line: b"dead" not in line
    assert (await ask(one, crash(), "Prefer: wait=20")).said["loaded"]  # the lane is there

    async def nothing(*_: Any) -> list[Any]:
        return []

    one.pipeline.buffer.mirror.take = nothing
    asking = asyncio.create_task(ask(one, [crash("dead"), crash()], "Prefer: wait=20"))
    await comes_true(lambda: bool(one.pipeline.buffer.waiters.segments))
    two = await start(folder="two", database=one.database, **nats)
    answer = await asking
    assert (answer.status, answer.said["loaded"], answer.said["dead"]) == (200, True, 1)
    assert two.pipeline.buffer.lane("crash_report").loaded == 1
    assert idle(one)


# --- not loaded ---

NOT_YET = (202, {**OK, "loaded": False})


@pytest.mark.parametrize("kind", KINDS)
async def test_the_time_passes(start: Start, kind: str) -> None:
    way = await start(kind)
    gate = Gate(way)
    asking = asyncio.create_task(ask(way, crash(), "Prefer: wait=1"))
    await comes_true(lambda: bool(gate.loads))
    admission = way.pipeline.ingest.admission
    assert (admission.requests, admission.bytes) == (1, 0)  # it holds no body meanwhile
    answer = await asking
    assert answer[:3] == (*NOT_YET, "wait=1")
    assert 0.9 < answer.seconds < 3
    assert idle(way)
    gate.open.set()
    await comes_true(lambda: rows(way) == 1)


async def test_zero_seconds_are_no_wait(start: Start) -> None:
    way = await start()
    assert (await ask(way, crash(), "Prefer: wait=0"))[:3] == (*NOT_YET, "wait=0")
    assert rows(way) == 0


async def test_nobody_waits_for_a_lane_that_can_not_be_loaded(start: Start) -> None:
    way = await start()
    way.database.blocked.add("crash_report")
    for _ in range(2):  # one that finds it out, and one that knows
        answer = await ask(way, [crash(), purchase(), {}], "Prefer: wait=20")
        assert (answer.status, answer.said["loaded"], answer.seconds < 5) == (207, False, True)
    assert (await ask(way, purchase(), "Prefer: wait=20")).said["loaded"]
    assert (rows(way), rows(way, "purchase")) == (0, 3)
    way.database.blocked.clear()
    await way.pipeline.loader.load_now()
    assert (await ask(way, crash(), "Prefer: wait=20")).said["loaded"]
    assert idle(way)


async def test_who_waits_already_gets_what_heals_in_time(start: Start) -> None:
    """A load that failed is repeated; only those that come meanwhile don't wait for it."""
    way = await start()
    gate = Gate(way)
    gate.error = SinkUnavailable("a lock", everywhere=False)
    gate.open.set()
    asking = asyncio.create_task(ask(way, crash(), "Prefer: wait=20"))
    await comes_true(lambda: way.pipeline.buffer.lane("crash_report").health.up is False)
    late = await ask(way, crash(), "Prefer: wait=20")
    assert late[:2] == NOT_YET
    gate.error = None
    assert (await asking)[:2] == (200, {**OK, "loaded": True, "dead": 0})
    assert rows(way) == 2


async def test_nobody_waits_behind_a_backlog(start: Start) -> None:
    way = await start(load_trigger_bytes=10_000)
    gate = Gate(way)
    await ask(way, [crash("x" * 1000)] * 11)
    answer = await ask(way, crash(), "Prefer: wait=20")
    assert (answer[:2], answer.seconds < 5, gate.loads) == (NOT_YET, True, [])
    gate.open.set()
    await way.pipeline.loader.load_now()
    assert (await ask(way, crash(), "Prefer: wait=20")).said["loaded"]


async def test_those_who_wait_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiters, "MOST", 3)
    way = await start()
    gate = Gate(way)
    first = asyncio.create_task(ask(way, [crash(), purchase()], "Prefer: wait=20"))
    await comes_true(lambda: way.pipeline.buffer.waiters._lanes == 2)
    assert (await ask(way, [crash(), purchase()], "Prefer: wait=20")).status == 202
    second = asyncio.create_task(ask(way, crash(), "Prefer: wait=20"))
    await comes_true(lambda: way.pipeline.buffer.waiters._lanes == 3)
    assert (await ask(way, crash(), "Prefer: wait=20"))[:2] == NOT_YET
    gate.open.set()
    assert [(await each).status for each in (first, second)] == [200, 200]
    assert idle(way)


@pytest.mark.parametrize("kind", KINDS)
async def test_who_leaves_waits_no_longer(start: Start, kind: str) -> None:
    way = await start(kind)
    gate = Gate(way)
    _, writer = await asyncio.open_connection("127.0.0.1", way.port)
    writer.write(post(json.dumps(crash()).encode(), "Prefer: wait=20"))
    await comes_true(lambda: bool(gate.loads))
    writer.transport.abort()
    await comes_true(lambda: idle(way))
    gate.open.set()
    await comes_true(lambda: rows(way) == 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_answers_all_of_them_at_once(start: Start, kind: str) -> None:
    way = await start(kind, mirror="journal", shutdown_timeout=3)
    gate = Gate(way)
    asking = [asyncio.create_task(ask(way, crash(), "Prefer: wait=20")) for _ in range(5)]
    await comes_true(lambda: bool(gate.loads) and way.pipeline.buffer.waiters._lanes == 5)
    began = time.perf_counter()
    stopping = asyncio.create_task(way.runner.cleanup())
    for each in asking:
        assert (await each)[:2] == NOT_YET
    assert time.perf_counter() - began < 2
    gate.open.set()
    await stopping
    assert rows(way) == 5


async def test_an_append_that_fails_leaves_nobody_waiting(start: Start) -> None:
    way = await start()

    async def fails(segments: object) -> Appended:
        return Appended((), MirrorUnavailable("away"))

    way.pipeline.buffer.mirror.append = fails  # type: ignore[method-assign]
    answer = await ask(way, crash(), "Prefer: wait=20")
    assert (answer.status, answer.applied, "loaded" in answer.said) == (503, None, False)
    assert idle(way)
