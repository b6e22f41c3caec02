"""SIGKILL at any moment: every event answered 200 is in its table, once."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.databases import Server
from tests.fault.driver import fill
from tests.fault.kills import kill_many
from tests.postgres import Postgres
from tests.service import Service, until

KILLS = int(os.environ.get("FAULT_KILLS") or 20)


async def test_sigkill_at_any_moment_loses_and_doubles_nothing(
    postgres: Postgres, make_service: Callable[..., Service], seed: int
) -> None:
    await kill_many(postgres, make_service, random.Random(seed), KILLS)


@pytest.mark.parametrize("own_server", ["mariadb", "sqlite"], indirect=True)
async def test_sigkill_of_one_of_two_on_one_folder_and_one_database(
    own_server: Server, make_service: Callable[..., Service], seed: int
) -> None:
    chance = random.Random(seed)
    await kill_many(own_server, make_service, chance, 3, services=2, connections=6)


async def test_sigkill_of_an_idle_service_keeps_what_waits(
    database: str, make_service: Callable[..., Service], seed: int
) -> None:
    """Nothing was loaded before, so all of it is recovered."""
    service = make_service(database_url=database, load_interval=300)
    driver = await fill(service, seed, 100)
    before = (await service.status())["books"]
    await service.kill()
    await service.start()

    async def recovered() -> bool:
        return bool((await service.status())["books"]["recovered"] == before["waiting"])

    await until(recovered, what="recovery of all")
    await service.drained()
    await driver.check(database)
