"""SIGKILL at chosen moments, again and again, under load."""

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


async def books_balance(service: Service) -> bool:
    """Whether the sum comes out, while events keep coming."""
    books: dict[str, Any] = (await service.status())["books"]
    went = sum(books[key] for key in ("loaded", "duplicate", "dead", "waiting"))
    return bool(books["balanced"] and books["accepted"] + books["recovered"] == went)


async def ledger_forgets(database: str) -> None:
    """Once the journal is empty no segment need be known any more, of dead processes neither."""

    async def forgotten() -> bool:
        count = "SELECT count(*) FROM datapipe_ledger WHERE kind = 'segment'"
        return bool((await asyncio.to_thread(Postgres.execute, database, count))[0][0] == 0)

    await until(forgotten, what="a ledger without segments")


async def kill_many(
    postgres: Postgres,
    make_service: Callable[..., Service],
    chance: random.Random,
    kills: int,
    *,
    restart_every: int = 0,
) -> dict[str, int]:
    """So many kills on one new database; AssertionError if an event is lost or doubled.

    Args: restart_every: kills until the database itself crashes or restarts, in between.
    """
    database = postgres.create_database()
    moments = [MOMENTS[n % len(MOMENTS)] for n in range(kills)]
    chance.shuffle(moments)
    unbalanced = restarts = 0
    async with Proxy(database).running() as proxy:
        service = make_service(
            database_url=proxy.url, load_interval=0.1, load_min_interval=0,
            load_trigger_bytes=20_000, event_modules=["tests.fault.modules.quick_recovery"],
        )  # fmt: skip
        await service.start()
        driver = Driver(lambda: service.url, chance.getrandbits(32))
        async with driver.running():
            for number, moment in enumerate(moments, 1):
                await driver.answered(chance.randint(5, 40))
                if restart_every and number % restart_every == 0:
                    how = chance.choice([signal.SIGINT, signal.SIGQUIT])
                    await asyncio.to_thread(postgres.stop, how)
                    if chance.random() < 0.5:  # killed while the database is away, too
                        await service.kill()
                        await service.start()
                        await driver.answered(10)
                    await asyncio.to_thread(postgres.start)
                    restarts += 1
                await kill_at(service, proxy, moment, chance.uniform(0, 0.005))
                await service.start()
                unbalanced += not await books_balance(service)
        await driver.settle()
        await service.drained()
        unbalanced += not await books_balance(service)
        verdict = await driver.check(database)
        assert not unbalanced, f"the books did not balance {unbalanced} times"
        assert verdict.duplicates_by_key, "no key was used twice: the test tests less than it says"
        await ledger_forgets(database)
        await service.kill()
    return {
        "restarts": restarts, "answered": verdict.answered, "lost": len(verdict.lost),
        "doubled": len(verdict.doubled), "duplicates_by_key": verdict.duplicates_by_key,
        "unbalanced": unbalanced,
    }  # fmt: skip
