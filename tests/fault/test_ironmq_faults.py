"""IronMQ fails, processes die: every event answered 200 is in its table, once; the books balance.

A POST that was answered 503 may be loaded all the same, where its answer was lost behind us.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.fault.driver import Driver, Verdict, fill
from tests.fault.ironmq_process import Queue, running_queue
from tests.service import Service, until

MakeService = Callable[..., Service]
# long enough for a POST to meet every fault, short enough for `make test`; FAULT_AWAY_S for longer
AWAY_S = float(os.environ.get("FAULT_AWAY_S") or 6)
KILLS = int(os.environ.get("FAULT_KILLS") or 20)


@pytest.fixture
async def queue() -> AsyncIterator[Queue]:
    async with running_queue("--latency", "0.005") as running:
        yield running


@pytest.fixture
def make(make_service: MakeService, database: str, queue: Queue) -> MakeService:
    """Services on this database and this IronMQ, quick to see that another is dead."""

    def made(**settings: Any) -> Service:
        return make_service(
            **{
                "database_url": database, **queue.settings, "mirror_timeout": 2,
                "event_modules": ["tests.fault.modules.quick_watch"],
                "load_interval": 0.2, "load_min_interval": 0, **settings,
            }
        )  # fmt: skip

    return made


async def settled(driver: Driver, queue: Queue, database: str, *services: Service) -> Verdict:
    """Once nothing is left in IronMQ: what became of the events, and what the books say."""
    await driver.settle()
    await queue.emptied()
    for service in services:
        books = await service.drained()
        went = books["loaded"] + books["duplicate"] + books["dead"]
        assert books["balanced"], books
        assert books["accepted"] + books["recovered"] == went, books
    verdict = await driver.compare(database)
    verdict.refused_stored.clear()
    verdict.check()
    assert verdict.answered > 0
    return verdict


async def refuses(service: Service) -> bool:
    return (await service.get("/readyz"))[0] == 503


async def recovered(service: Service) -> bool:
    return bool(service.logged("recovered"))


# --- IronMQ fails ---


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_one_answer_in_twenty_is_reset(
    queue: Queue, make: MakeService, database: str, seed: int, after: bool
) -> None:
    service = await make().start()
    await queue.order(faults=[{"what": "reset", "rate": 0.05, "after": after}])
    driver = Driver(lambda: service.url, seed, connections=32)
    async with driver.running():
        await driver.answered(800)
    report = await queue.order(clear=True)
    await settled(driver, queue, database, service)
    assert sum(report["statuses"].values()) < report["total"], "nothing was reset"


@pytest.mark.parametrize("fault", ["503 in HTML", "closed", "reset"])
async def test_away_for_a_while(
    queue: Queue, make: MakeService, database: str, seed: int, fault: str
) -> None:
    service = await make().start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        await driver.answered(100)
        if fault == "503 in HTML":
            await queue.order(faults=[{"what": "503", "rate": 1.0}])
        else:
            await queue.order(away=fault, away_s=AWAY_S)
        ending = asyncio.create_task(asyncio.sleep(AWAY_S))
        status, answer = await service.post({"event_name": "install", "user_id": 0, "timestamp": 0})
        assert (status, answer["status_code"]) == (503, 9)
        await until(lambda: refuses(service), what="503 of /readyz")
        await ending
        if fault == "503 in HTML":
            await queue.order(clear=True)
        await driver.answered(100)
    verdict = await settled(driver, queue, database, service)
    assert [len(service.logged(f"mirror {way}")) for way in ("down", "up")] == [1, 1]
    assert verdict.answered >= 200


async def test_every_reservation_expires(
    queue: Queue, make: MakeService, database: str, seed: int
) -> None:
    victim = make(load_interval=300)
    driver = await fill(victim, seed, 200)
    await victim.kill()
    await queue.order(faults=[{"what": "expire", "rate": 1.0}])
    heirs = [make(), make()]
    await asyncio.gather(*(heir.start() for heir in heirs))
    await settled(driver, queue, database, *heirs)


async def test_messages_are_delivered_twice(
    queue: Queue, make: MakeService, database: str, seed: int
) -> None:
    await queue.order(faults=[{"what": "duplicate", "rate": 1.0}])
    victim, heir = make(load_interval=300), make()
    await asyncio.gather(victim.start(), heir.start())
    services = [victim, heir]
    driver = Driver(lambda: random.choice(services).url, seed)
    async with driver.running():
        await driver.answered(200)
        services.remove(victim)
        await victim.kill()
    await settled(driver, queue, database, heir)
    assert (await heir.status())["books"]["duplicate"] > 0


# --- processes die ---


async def test_killed_twenty_times(
    queue: Queue, make: MakeService, database: str, seed: int
) -> None:
    chance = random.Random(seed)
    service = make()
    await service.start()
    driver = Driver(lambda: service.url, seed, connections=32)
    async with driver.running():
        for _ in range(KILLS):
            await driver.answered(chance.randint(5, 60))
            await asyncio.sleep(chance.uniform(0, 0.1))
            await service.kill()
            await service.start()
            assert (await service.status())["books"]["balanced"]
    await settled(driver, queue, database, service)


async def test_one_of_two_is_killed_and_the_other_loads_what_it_left(
    queue: Queue, make: MakeService, database: str, seed: int
) -> None:
    victim, heir = make(load_interval=1.0), make()
    await asyncio.gather(victim.start(), heir.start())
    services = [victim, heir]
    chance = random.Random(seed)
    driver = Driver(lambda: chance.choice(services).url, seed, connections=32)
    async with driver.running():
        await driver.answered(300)
        assert not heir.logged("recovered"), "the living fight"
        services.remove(victim)
        await victim.kill()
        await until(lambda: recovered(heir), what="recovery")
        await driver.answered(50)
    await settled(driver, queue, database, heir)


async def test_a_rolling_deploy_hands_over(
    queue: Queue, make: MakeService, database: str, seed: int
) -> None:
    """Three releases, one after the other; each is there before the last one goes."""
    service = await make(load_interval=300).start()
    driver = Driver(lambda: service.url, seed)
    old: list[Service] = []
    async with driver.running():
        for _ in range(3):
            await driver.answered(60)
            old.append(service)
            service = await make(load_interval=300).start()
            await driver.answered(20)
            assert await old[-1].stop() == 0
        await driver.answered(20)
    assert not driver.torn
    assert [each.logged("stopped")[0]["waiting"] for each in old] == [0, 0, 0]
    await service.load()
    verdict = await settled(driver, queue, database, service)
    assert not verdict.refused_stored
    loads = [line for each in (*old, service) for line in each.logged("segments loaded")]
    assert sum(line["rows"] for line in loads) == verdict.rows


async def test_a_release_that_ends_with_the_database_away_leaves_it_to_the_next(
    queue: Queue, make: MakeService, own_postgres: Any, seed: int
) -> None:
    database = own_postgres.create_database()
    service = make(database_url=database, load_interval=300)
    driver = await fill(service, seed, 100)
    own_postgres.stop()
    assert await service.stop() == 0
    assert service.logged("stopped")[0]["waiting"] > 0
    await asyncio.to_thread(own_postgres.start)
    heir = await make(database_url=database).start()
    await settled(driver, queue, database, heir)
