"""SIGKILL at any moment: every event answered 200 is in its table, once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from typing import Any

from tests.fault.driver import Driver
from tests.fault.proxy import Moment, Proxy
from tests.postgres import Postgres
from tests.service import Service, until

KILLS = int(os.environ.get("FAULT_KILLS") or 20)
# None: at any time, most likely while something is being appended
MOMENTS = (None, *Moment)


async def kill_at(service: Service, proxy: Proxy, moment: Moment | None, delay_s: float) -> None:
    """SIGKILL at the next such moment, and a little later where `delay_s` says so."""
    if moment is None:
        await asyncio.sleep(delay_s * 20)
    else:

        async def act() -> bool:
            if moment is Moment.TOLD:  # from here on the segments are removed from the journal
                await asyncio.sleep(delay_s)
            os.kill(service.pid, signal.SIGKILL)
            return moment is not Moment.COMMIT

        await proxy.at(moment, act)
    await service.kill()


async def check_books(service: Service) -> None:
    """The sum comes out, while events keep coming."""
    books: dict[str, Any] = (await service.status())["books"]
    assert books["balanced"], books
    went = sum(books[key] for key in ("loaded", "duplicate", "dead", "waiting"))
    assert books["accepted"] + books["recovered"] == went, books


async def ledger_forgets(database: str) -> None:
    """Once the journal is empty no segment need be known any more, of dead processes neither."""

    async def forgotten() -> bool:
        count = "SELECT count(*) FROM datapipe_ledger WHERE kind = 'segment'"
        return bool((await asyncio.to_thread(Postgres.execute, database, count))[0][0] == 0)

    await until(forgotten, what="a ledger without segments")


async def test_sigkill_at_any_moment_loses_and_doubles_nothing(
    database: str, proxy: Proxy, make_service: Callable[..., Service], seed: int
) -> None:
    chance = random.Random(seed)
    moments = [MOMENTS[n % len(MOMENTS)] for n in range(KILLS)]
    chance.shuffle(moments)
    service = make_service(
        database_url=proxy.url, load_interval=0.1, load_min_interval=0, load_trigger_bytes=20_000,
        event_modules=["tests.fault.modules.quick_recovery"],
    )  # fmt: skip
    await service.start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        for moment in moments:
            await driver.answered(chance.randint(5, 40))
            await kill_at(service, proxy, moment, chance.uniform(0, 0.005))
            await service.start()
            await check_books(service)
    await driver.settle()
    await service.drained()
    await check_books(service)
    verdict = await driver.check(database)
    assert verdict.duplicates_by_key, "no key was used twice: the test tests less than it says"
    await ledger_forgets(database)


async def test_sigkill_of_an_idle_service_keeps_what_waits(
    database: str, make_service: Callable[..., Service], seed: int
) -> None:
    """Nothing was loaded before, so all of it is recovered."""
    service = make_service(database_url=database, load_interval=300)
    await service.start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        await driver.answered(100)
    before = (await service.status())["books"]
    await service.kill()
    await service.start()

    async def recovered() -> bool:
        return bool((await service.status())["books"]["recovered"] == before["waiting"])

    await until(recovered, what="recovery of all")
    await service.drained()
    await driver.check(database)
