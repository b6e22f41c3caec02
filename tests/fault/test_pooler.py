"""PgBouncer between the service and PostgreSQL: what works through it, and what is said if not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from datapipe.settings import Settings
from datapipe.sinks import open_sink
from tests.fault.test_database import OFTEN, check_all, loads, summary_is, under_load
from tests.pgbouncer import PgBouncer
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
ONE_CONNECTION = {"pool_mode": "transaction", "default_pool_size": 1}


async def test_it_is_killed_under_load(database: str, make_service: MakeService, seed: int) -> None:
    """Loads, heartbeats and all share one connection to the server, and nothing waits for long."""
    with PgBouncer.running(database, **ONE_CONNECTION) as pooler:
        service = make_service(database_url=pooler.url, **OFTEN)
        async with under_load(service, seed) as driver:
            for _ in range(3):
                await asyncio.to_thread(pooler.stop, signal.SIGKILL)
                await summary_is(service, "database_down")
                await driver.answered(50)
                await asyncio.to_thread(pooler.start)
                await loads(service)
                await summary_is(service, "healthy")
        await check_all(driver, service, database)
    assert len(service.logged("database down")) == 3
    assert not service.logged("lane blocked")


async def test_dead_letters_and_heartbeats_go_through_it(
    database: str, postgres: Postgres, make_service: MakeService
) -> None:
    def install(user: int) -> dict[str, Any]:
        return {"event_name": "install", "user_id": user, "timestamp": 1}

    with PgBouncer.running(database, **ONE_CONNECTION) as pooler:
        service = make_service(
            database_url=pooler.url, event_modules=["tests.fault.modules.quick_watch"]
        )
        await service.start()
        await service.post(install(0))
        await service.drained()
        even = "ALTER TABLE install ADD CONSTRAINT even CHECK (user_id % 2 = 0)"
        await postgres.aexecute(database, even)
        await service.post([install(user) for user in range(1, 8)])
        books = await service.drained()
        assert (books["loaded"], books["dead"]) == (4, 4)
        await postgres.aexecute(database, "ALTER TABLE install DROP CONSTRAINT even")
        async with service.session.post(f"{service.url}/dead/replay", json={"all": True}) as answer:
            assert await answer.json() == {"replayed": {"install": 4}, "dead": 0}
        users = await postgres.aexecute(database, "SELECT user_id FROM install ORDER BY 1")
        assert users == [(user,) for user in range(8)]

        async def beats() -> bool:
            sql = "SELECT max(beats) > 3 FROM datapipe_processes"
            return bool((await postgres.aexecute(database, sql))[0][0])

        await until(beats, what="heartbeats")
        assert await service.stop() == 0


async def test_the_server_behind_it_is_away(
    own_postgres: Postgres, make_service: MakeService
) -> None:
    """It holds queries back for two minutes; the page says so at once, and nothing is lost."""
    database = own_postgres.create_database()
    modules = ["tests.fault.modules.quick_watch", "tests.fault.modules.quick_answers"]
    harms = ((own_postgres.freeze, own_postgres.thaw), (own_postgres.stop, own_postgres.start))
    with PgBouncer.running(database, **ONE_CONNECTION, server_login_retry=1) as pooler:
        service = make_service(database_url=pooler.url, event_modules=modules, **OFTEN)
        await service.start()
        await service.post({"event_name": "install", "user_id": 0, "timestamp": 1})
        await service.drained()
        for user, (harm, repair) in enumerate(harms, 1):
            await asyncio.to_thread(harm)
            await service.post({"event_name": "install", "user_id": user, "timestamp": 1})
            await summary_is(service, "database_down")
            await asyncio.to_thread(repair)
            await service.drained()
            await summary_is(service, "healthy")
        books = await service.drained()
    assert (books["loaded"], books["duplicate"], books["balanced"]) == (3, 0, True)
    users = own_postgres.execute(database, "SELECT user_id FROM install ORDER BY 1")
    assert users == [(0,), (1,), (2,)]


async def found(url: str) -> list[tuple[str, str]]:
    async with open_sink(Settings(database_url=url), "test") as sink:
        return await sink.check([])


@pytest.mark.parametrize("mode", ["transaction", "session", "statement"])
async def test_check_finds_statement_mode(database: str, mode: str) -> None:
    with PgBouncer.running(database, pool_mode=mode) as pooler:
        wrong = [text for level, text in await found(pooler.url) if level == "fail"]
    told = ["database: BEGIN ends the connection: a pooler in statement mode has no transactions:"
            " set pool_mode = transaction (PgBouncer)"]  # fmt: skip
    assert wrong == (told if mode == "statement" else [])


async def test_check_says_what_to_do_about_options(database: str) -> None:
    with PgBouncer.running(database, pool_mode="transaction") as pooler:
        ((level, text),) = await found(f"{pooler.url}?options=-csearch_path%3Dx")
    assert level == "fail"
    assert "unsupported startup parameter: options; " in text
    assert "take it out of database_url" in text


async def test_a_pooler_that_is_full_is_away_and_not_wrong(database: str) -> None:
    """So that a release can be deployed meanwhile."""
    with PgBouncer.running(database, pool_mode="transaction", max_client_conn=1) as pooler:
        taken = psycopg2.connect(pooler.url)
        ((level, text),) = await found(pooler.url)
        taken.close()
    assert level == "away", text
    assert "no more connections allowed" in text
