"""SIGTERM: what was received is finished, what waits is loaded, the rest is kept; exit 0."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import psycopg2
import pytest

from tests.fault.driver import Driver, fill
from tests.fault.moments import Moment
from tests.fault.proxy import Proxy
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
LATER = {"load_interval": 300}
INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 2}


async def restart_and_check(service: Service, driver: Driver, database: str) -> None:
    """The next start loads what was left."""

    async def recovered() -> bool:
        return bool((await service.status())["books"]["recovered"])

    await service.start()
    await driver.settle()
    await until(recovered, what="recovery, which runs behind the open port")
    await service.drained()
    await driver.check(database)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_under_load_loads_all_that_was_answered(
    database: str, make_service: MakeService, seed: int, number: signal.Signals
) -> None:
    service = make_service(database_url=database, **LATER)
    await service.start()
    driver = Driver(lambda: service.url, seed, connections=48, pause_s=0)
    async with driver.running():
        await driver.answered(300)
        assert await service.stop(number) == 0
    assert not driver.torn, "an answer broke off"
    await driver.check(database)
    (stopped,) = service.logged("stopped")
    assert stopped["waiting"] == 0
    assert [line["signal"] for line in service.logged("stopping")] == [number.name]


async def test_a_second_sigterm_skips_the_loading(
    database: str, proxy: Proxy, make_service: MakeService, seed: int
) -> None:
    service = make_service(database_url=proxy.url, **LATER)
    driver = await fill(service, seed)
    held, gone = asyncio.Event(), asyncio.Event()

    async def hold(moment: Moment) -> bool:
        if moment is Moment.COPY:
            held.set()
            await gone.wait()
        return True

    proxy.hook = hold
    service._process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    await asyncio.wait_for(held.wait(), 20)
    started = time.monotonic()
    assert await service.stop(signal.SIGTERM) == 0
    assert time.monotonic() - started < 3
    assert service.logged("stopped")[0]["waiting"] > 0
    proxy.let_pass()
    gone.set()  # only now the server hears that the client is gone
    await restart_and_check(service, driver, database)


async def test_sigterm_with_the_database_away_ends_soon_and_keeps_all(
    own_postgres: Postgres, make_service: MakeService, seed: int
) -> None:
    database = own_postgres.create_database()
    service = make_service(database_url=database, **LATER)
    driver = await fill(service, seed)
    own_postgres.stop()
    started = time.monotonic()
    assert await service.stop() == 0
    assert time.monotonic() - started < 5
    assert service.logged("stopped")[0]["waiting"] > 0
    await asyncio.to_thread(own_postgres.start)
    await restart_and_check(service, driver, database)


@pytest.mark.parametrize("moment", [Moment.COPY, Moment.COMMIT, Moment.SENT])
async def test_sigterm_with_the_database_frozen_in_a_load_ends_in_time(
    own_postgres: Postgres, make_service: MakeService, seed: int, moment: Moment
) -> None:
    database = own_postgres.create_database()
    async with Proxy(database).running() as proxy:
        service = make_service(database_url=proxy.url, shutdown_timeout=2, **LATER)
        driver = await fill(service, seed)

        async def freeze() -> bool:
            own_postgres.freeze()
            return True

        freezing = asyncio.create_task(proxy.at(moment, freeze))
        await asyncio.sleep(0)  # so that it is there before the first load
        await ends_in(4.0, service)
        await freezing
        own_postgres.thaw()
        await restart_and_check(service, driver, database)


async def test_sigterm_with_the_database_frozen_before_any_load_ends_in_time(
    own_postgres: Postgres, make_service: MakeService, seed: int
) -> None:
    """A connection is accepted by the kernel, and then nothing comes."""
    database = own_postgres.create_database()
    service = make_service(database_url=database, shutdown_timeout=2, **LATER)
    driver = await fill(service, seed)

    async def reached() -> bool:
        return bool(service.logged("database up"))

    await until(reached, what="a database that was up")
    own_postgres.freeze()
    await ends_in(4.0, service)
    own_postgres.thaw()
    await restart_and_check(service, driver, database)


async def ends_in(seconds: float, service: Service) -> None:
    started = time.monotonic()
    assert await service.stop() == 0
    took = time.monotonic() - started
    assert took < seconds, f"the stop took {took:.1f} s"


async def test_a_stop_tries_once_more_what_was_put_off(
    postgres: Postgres, database: str, make_service: MakeService
) -> None:
    """A lane in back-off is loaded, if that is possible by now."""
    service = make_service(database_url=database, event_modules=["tests.fault.modules.quick_locks"])
    await service.start()
    assert (await service.post(INSTALL))[0] == 200
    await service.drained()
    locks = psycopg2.connect(database)
    locks.cursor().execute("LOCK TABLE install")
    assert (await service.post(INSTALL))[0] == 200

    async def for_long() -> bool:
        return any(line["retry_seconds"] >= 2 for line in service.logged("load failed"))

    await until(for_long, what="a back-off of 2 s")
    service._process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    locks.close()
    assert await service.wait() == 0
    assert [line["waiting"] for line in service.logged("stopped")] == [0]
    assert postgres.execute(database, "SELECT count(*) FROM install") == [(2,)]


async def test_what_was_loaded_is_removed_even_where_loading_is_skipped(
    postgres: Postgres, database: str, make_service: MakeService
) -> None:
    """The second signal ends the loading, not the removal that is under way."""
    service = make_service(
        database_url=database, event_modules=["tests.fault.modules.slow_removals"], **LATER
    )
    await service.start()
    assert (await service.post(INSTALL))[0] == 200
    assert (await service.load())["loaded"] == {"install": 1}

    async def stopping() -> bool:
        return bool(service.logged("stopping"))

    service._process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    await until(stopping, what="stopping")
    assert await service.stop(signal.SIGTERM) == 0
    assert len(service.logged("stopping")) == 2
    beats = "SELECT process FROM datapipe_processes"
    before = await postgres.aexecute(database, beats)
    await service.start()

    async def looked() -> bool:
        return await postgres.aexecute(database, beats) != before

    await until(looked, what="a heartbeat, which follows the first look at the mirror")
    assert (await service.status())["books"]["recovered"] == 0
