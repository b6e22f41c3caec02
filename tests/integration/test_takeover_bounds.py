"""How soon what a dead process left is loaded: `docs/operations.md` says it, and this holds it.

The services are real, with all their constants, and so are their mirrors; the database is in
memory, and the clock is simulated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web

from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.events.segment import Segment
from datapipe.mirrors import open_mirror
from datapipe.mirrors.ironmq.mirror import open_ironmq
from datapipe.mirrors.ironmq.wire import pack
from datapipe.settings import Settings
from datapipe.sinks import Beat
from tests.doubles.ironmq import IronMQ
from tests.doubles.memory_database import MemoryDatabase
from tests.doubles.virtual_time import VirtualTime

# what docs/operations.md says
JOURNAL_S = 35
IRONMQ_S = 45
IRONMQ_RESERVED_S = 160
LONGEST_LEASE_S = 120
LONG_S = 4000  # by then looks are rare


def simulated(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(main())


def now() -> float:
    return asyncio.get_running_loop().time()


def unix_time() -> float:
    return 1_800_000_000.0 + now()


def ironmq(settings: Settings, process: str) -> Any:
    return open_ironmq(settings, process, unix_time)


class Serving(NamedTuple):
    pipeline: Pipeline
    url: str


@asynccontextmanager
async def serving(
    database: MemoryDatabase, opened: Callable[[Settings, str], Any] = open_mirror, **more: Any
) -> AsyncIterator[Serving]:
    settings = Settings(host="127.0.0.1", port=0, **more)
    app = create_app(settings, open_mirror=opened, open_sink=database.open)
    runner = create_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield Serving(app[PIPELINE], f"http://{host}:{port}/")
    finally:
        app[PIPELINE]._stopped = True  # it is killed: nothing is loaded on the way out
        await runner.cleanup()


async def post(url: str, user: int) -> None:
    event = {"event_name": "install", "user_id": user, "timestamp": 1}
    async with aiohttp.ClientSession() as client, client.post(url, json=event) as response:
        assert response.status == 200


async def loaded(database: MemoryDatabase, rows: int, timeout_s: float) -> float:
    """Seconds until so many rows are there."""
    started = now()
    async with asyncio.timeout(timeout_s):
        while sum(map(len, database.lines.values())) < rows:
            await asyncio.sleep(0.1)
    return now() - started


class Neighbour:
    """A process on IronMQ that beats, or not."""

    def __init__(self, mq: IronMQ, database: MemoryDatabase, name: str = "neighbour") -> None:
        self._name = name
        self._mq = mq
        self._database = database
        self._count = 0

    def beat(self) -> None:
        self._count += 1
        self._database.beats[self._name] = Beat(self._count, False)

    async def lives(self, seconds: float) -> None:
        ends = now() + seconds
        while now() < ends:
            self.beat()
            await asyncio.sleep(5)

    def posts(self, messages: int) -> None:
        row = b"7\t1\t2027-01-15 08:00:00+00\n"
        for _ in range(messages):
            body = pack(Segment("install", (), row, 1), self._name, unix_time())
            self._mq.put("install", [body])

    def reserves(self, messages: int, lease_s: float) -> None:
        self._mq._store.reserve("install", {"n": messages, "timeout": round(lease_s)})


@asynccontextmanager
async def two_on_ironmq() -> AsyncIterator[tuple[Serving, Neighbour, MemoryDatabase, IronMQ]]:
    database = MemoryDatabase()
    async with AsyncExitStack() as stack:
        mq = await stack.enter_async_context(IronMQ(clock=unix_time, latency=0.05))
        settings = {
            "mirror": "ironmq", "ironmq_host": mq.host, "ironmq_token": mq.token,
            "ironmq_project_id": mq.project_id,
        }  # fmt: skip
        heir = await stack.enter_async_context(serving(database, ironmq, **settings))
        yield heir, Neighbour(mq, database), database, mq


@pytest.mark.parametrize("messages", [50, 250, 900])
def test_what_a_dead_process_left_in_ironmq(messages: int) -> None:
    async def main() -> None:
        async with two_on_ironmq() as (_, neighbour, database, mq):
            await neighbour.lives(LONG_S)
            neighbour.posts(messages)
            assert await loaded(database, messages, 3600) < IRONMQ_S
            await asyncio.sleep(1)
            assert mq.queue("install").size == 0

    simulated(main)


@pytest.mark.parametrize(
    ("messages", "lease_s"), [(20, 30), (250, 60), (900, 60), (20, LONGEST_LEASE_S)]
)
def test_what_a_dead_process_had_reserved_in_ironmq(messages: int, lease_s: float) -> None:
    """And the page says so until it is there."""

    async def main() -> None:
        async with two_on_ironmq() as (heir, neighbour, database, mq):
            await neighbour.lives(LONG_S)
            neighbour.posts(messages)
            neighbour.reserves(20, lease_s)
            died = now()
            most = lease_s + IRONMQ_RESERVED_S - LONGEST_LEASE_S
            loading = asyncio.create_task(loaded(database, messages, 3600))
            await loaded(database, messages - 20, IRONMQ_S)
            await asyncio.sleep(IRONMQ_S - (now() - died))
            if lease_s > IRONMQ_S:
                status = heir.pipeline.status.snapshot()
                assert status["summary"]["state"] == "recovering", status["summary"]
                assert status["mirror"]["left_messages"] == 20
                assert status["mirror"]["left_seconds"] <= IRONMQ_RESERVED_S
            assert await loading < most
            await asyncio.sleep(1)
            assert mq.queue("install").size == 0
            assert heir.pipeline.status.snapshot()["summary"]["state"] == "healthy"

    simulated(main)


def test_a_process_that_woke_and_dies_again() -> None:
    async def main() -> None:
        async with two_on_ironmq() as (_, neighbour, database, _):
            for rows in (5, 10, 15):
                await neighbour.lives(LONG_S)
                neighbour.posts(5)
                assert await loaded(database, rows, 3600) < IRONMQ_S

    simulated(main)


def test_what_lies_behind_more_than_a_hundred_messages_of_the_living() -> None:
    """It can't be seen yet, and is looked for until it can."""

    async def main() -> None:
        async with two_on_ironmq() as (_, neighbour, database, mq):
            living = Neighbour(mq, database, "living")
            living.posts(150)
            beating = asyncio.create_task(living.lives(2 * LONG_S))
            await neighbour.lives(LONG_S)
            neighbour.posts(5)
            await asyncio.sleep(900)
            assert not database.lines
            older = list(mq.queue("install").messages)[:100]
            mq._store.delete_many("install", {"ids": [{"id": id} for id in older]})
            assert await loaded(database, 5, 3600) < IRONMQ_S
            beating.cancel()

    simulated(main)


def test_what_a_dead_process_left_in_a_lane_that_was_blocked() -> None:
    """It is loaded when the lane heals, not at the next rare look."""

    async def main() -> None:
        async with two_on_ironmq() as (heir, neighbour, database, _):
            database.blocked.add("install")
            neighbour.posts(5)
            await neighbour.lives(LONG_S)
            await post(heir.url, 1)
            await asyncio.sleep(LONG_S)
            assert heir.pipeline.buffer.lane("install").blocked
            database.blocked.clear()
            await loaded(database, 1, 3600)
            assert await loaded(database, 6, 3600) < IRONMQ_S

    simulated(main)


def test_the_journal_of_a_dead_process(tmp_path: Path) -> None:
    async def main() -> None:
        database = MemoryDatabase()
        settings = {"mirror": "journal", "data_dir": str(tmp_path)}
        async with serving(database, **settings):
            for turn in range(1, 6):
                async with serving(database, **settings) as victim:
                    await asyncio.sleep(600 + 7 * turn)
                    await post(victim.url, turn)
                assert await loaded(database, turn, 3600) < JOURNAL_S

    simulated(main)
