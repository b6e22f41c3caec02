"""What a dead process left in IronMQ is loaded soon, whoever had reserved it; the page tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest

from tests.fault.ironmq_process import Queue, running_queue
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
QUICK_WATCH = "tests.fault.modules.quick_watch"
QUICK_SILENCE = "tests.fault.modules.quick_silence"
QUICK_LOCKS = "tests.fault.modules.quick_locks"


@pytest.fixture
async def queue() -> AsyncIterator[Queue]:
    async with running_queue() as running:
        yield running


@pytest.fixture
def make(make_service: MakeService, database: str, queue: Queue) -> MakeService:
    def made(*modules: str, **settings: Any) -> Service:
        return make_service(
            **{
                "database_url": database, **queue.settings, "event_modules": list(modules),
                "load_interval": 0.2, "load_min_interval": 0, **settings,
            }
        )  # fmt: skip

    return made


def event(user: int) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user, "timestamp": 1}


async def left_behind(make: MakeService, module: str, messages: int) -> None:
    """So many messages of a process that was killed; their table is there."""
    victim = await make(module, load_interval=300).start()
    assert (await victim.post(event(0)))[0] == 200
    await victim.load()
    for user in range(messages):
        assert (await victim.post(event(user + 1)))[0] == 200
    await victim.kill()


@contextmanager
def locked_table(database: str) -> Iterator[None]:
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE install IN ACCESS EXCLUSIVE MODE")
        yield
    connection.close()


def rows(database: str) -> list[int]:
    return sorted(user for (user,) in Postgres.execute(database, "SELECT user_id FROM install"))


async def test_leases_are_prolonged_while_their_messages_are_deleted(
    queue: Queue, make: MakeService, database: str
) -> None:
    """Each prolonging makes the reservation worthless with which a message is to be deleted."""
    await left_behind(make, QUICK_WATCH, 100)
    await queue.order(latency=0.03)

    async def prolonging() -> bool:
        return (await queue.report())["requests"].get("touch", 0) > 10

    with locked_table(database):
        heir = await make(QUICK_WATCH).start()
        await until(prolonging, what="prolonging")
    await queue.emptied(20)
    books = await heir.drained()
    assert (books["recovered"], books["loaded"], books["duplicate"]) == (100, 100, 0)
    assert rows(database) == list(range(101))
    report = await queue.report()
    assert "403" not in report["statuses"], report


async def test_what_a_dead_recoverer_had_reserved_is_taken_over_and_told(
    queue: Queue, make: MakeService, database: str
) -> None:
    """After several looks, for there is more than one can take."""
    await left_behind(make, QUICK_SILENCE, 250)
    assert await queue.reserve("install", 20, 12.0) == 20  # and whoever did it is no more
    heir = await make(QUICK_SILENCE).start()
    reserved = asyncio.get_running_loop().time()

    async def told() -> bool:
        status = await heir.status()
        return bool(status["books"]["loaded"] == 230 and status["mirror"]["left_messages"] == 20)

    await until(told, 10, "20 messages left")
    summary = (await heir.status())["summary"]
    assert summary["state"] == "recovering", summary
    assert "20 messages" in summary["text"], summary
    await queue.emptied(20)
    assert asyncio.get_running_loop().time() - reserved < 20
    await heir.drained()
    assert rows(database) == list(range(251))

    async def healthy() -> bool:
        return bool((await heir.status())["summary"]["state"] == "healthy")

    await until(healthy, 5, "a healthy page")


async def test_a_stop_gives_back_what_was_reserved(
    queue: Queue, make: MakeService, database: str
) -> None:
    await left_behind(make, QUICK_SILENCE, 50)
    with locked_table(database):
        first = await make(QUICK_SILENCE, QUICK_LOCKS).start()

        async def recovered() -> bool:
            return bool(first.logged("recovered"))

        await until(recovered, 10, "recovery")
        await queue.order(latency=0.05)  # one after the other they would take too long
        assert await first.stop() == 0
    assert first.logged("stopped")[0]["waiting"] == 50
    await make(QUICK_SILENCE).start()
    await queue.emptied(10)  # a lease is of 30 s
    assert rows(database) == list(range(51))
