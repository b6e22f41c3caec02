"""Processes on several machines with one NATS cluster: whatever fails, each event is in once."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fault.machines import Machines, MakeService
from tests.fault.moments import Moment
from tests.fault.nats_faults import sent_again, three_at_once
from tests.postgres import Postgres
from tests.service import until

ROUNDS = int(os.environ.get("FAULT_ROUNDS") or 3)


@pytest.fixture
async def machines(
    own_postgres: Postgres, make_service: MakeService, tmp_path: Path, seed: int
) -> AsyncIterator[Machines]:
    chance = random.Random(seed)
    async with Machines.running(tmp_path, own_postgres, make_service, chance) as machines:
        yield machines


async def test_faults_at_random_three_at_once(machines: Machines) -> None:
    for _ in range(ROUNDS):
        print(await machines.round(three_at_once))
    print(dict(machines.driver.statuses))


async def test_what_is_stored_twice_is_a_duplicate(machines: Machines) -> None:
    await machines.round(sent_again)
    duplicates = 0
    for service in machines.services:
        duplicates += (await service.status())["books"]["duplicate"]
    verdict = await machines.check()
    assert duplicates > verdict.duplicates_by_key


async def test_whoever_sleeps_past_the_fence_loads_nothing(
    postgres: Postgres, make_service: MakeService, tmp_path: Path, seed: int
) -> None:
    """Meanwhile others have loaded what it took, and the ledger has forgotten it."""
    chance, modules = random.Random(seed), ["tests.fault.modules.quick_fence"]
    async with Machines.running(
        tmp_path, postgres, make_service, chance, processes=2, modules=modules, load_workers=1
    ) as machines:
        sleeper, proxy = machines.services[1], machines.proxies[1]
        began, goes_on = asyncio.Event(), asyncio.Event()
        machines.away.add(sleeper)

        async def sleep() -> bool:
            async with machines.frozen(sleeper):
                began.set()
                await goes_on.wait()
            return True

        async with asyncio.TaskGroup() as group:
            group.create_task(proxy.at(Moment.LEDGER, sleep, 60))
            while not began.is_set():
                await machines.goes_on()
            await until(lambda: _empty(machines), 60, "an empty cluster")
            await machines.check()
            forget = "DELETE FROM datapipe_ledger WHERE kind <> 'cluster'"  # keys, too
            await postgres.aexecute(machines.database, forget)
            goes_on.set()

        async def refused() -> bool:
            return any(
                "held for too long" in line["error"] for line in sleeper.logged("load failed")
            )

        await until(refused, what="a load that comes too late")
        await machines.goes_on()
        await machines.settled()
        await machines.check()


async def _empty(machines: Machines) -> bool:
    return await machines.messages() == 0
