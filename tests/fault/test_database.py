"""Whatever becomes of the database: events are taken, kept, and in their tables once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from datapipe.errors import SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Table, open_sink
from tests.databases import Server, aexecute, make_refusing
from tests.fault.driver import Driver
from tests.fault.kills import counts_right, is_refused, loads
from tests.fault.moments import Moment, Moments, cut
from tests.fault.proxy import Proxy, moments_of
from tests.postgres import Postgres
from tests.service import Service, until

OFTEN = {"load_interval": 0.1, "load_min_interval": 0, "load_trigger_bytes": 20_000}
MakeService = Callable[..., Service]


@asynccontextmanager
async def under_load(service: Service, seed: int, **options: Any) -> AsyncIterator[Driver]:
    """A started service that is posted to, and has loaded something."""
    await service.start()
    driver = Driver(lambda: service.url, seed, **options)
    async with driver.running():
        await loads(service)
        yield driver


async def check_all(driver: Driver, service: Service, database: str) -> dict[str, Any]:
    """All is in its table once, and the service's own counts say the same."""
    await driver.settle()
    books = await service.drained()
    verdict = await driver.check(database)
    counts_right(books, verdict)
    return books


async def summary_is(service: Service, *states: str) -> None:
    async def told() -> bool:
        return (await service.status())["summary"]["state"] in states

    await until(told, what=f"summary {states}")


ENDS = [
    ("postgres", "stop"), ("postgres", "crash"), ("mariadb", "crash"), ("sqlite", "stop")
]  # fmt: skip


@pytest.mark.parametrize(("own_server", "how"), ENDS, indirect=["own_server"])
async def test_the_database_ends_and_comes_back(
    own_server: Server, make_service: MakeService, seed: int, how: str
) -> None:
    """Of SQLite, which has no server: the folder of its file is away for a while."""
    database = own_server.create_database()
    make_refusing(database, "install", 50)
    service = make_service(database_url=database, **OFTEN)
    async with under_load(service, seed, refuses=is_refused) as driver:
        for _ in range(2):
            await asyncio.to_thread(getattr(own_server, how))
            await summary_is(service, "database_down")
            await driver.answered(50)  # events are taken all the same
            assert (await service.get("/readyz"))[0] == 200
            await asyncio.to_thread(own_server.start)
            await loads(service)
            await summary_is(service, "healthy", "dead_letters")
    books = await check_all(driver, service, database)
    assert books["dead"] > 0
    assert len(service.logged("database down")) == 2


async def test_postgres_is_away_at_the_start(
    own_postgres: Postgres, make_service: MakeService, seed: int
) -> None:
    database = own_postgres.create_database()
    own_postgres.stop()
    service = make_service(database_url=database, **OFTEN)
    await service.start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        await driver.answered(50)
        await summary_is(service, "database_down")
        assert (await service.get("/readyz"))[0] == 200
        status = await service.status()
        assert "PostgreSQL does not answer" in status["summary"]["text"]
        assert status["database"]["up"] is False
        assert status["books"]["waiting"] == status["books"]["accepted"] > 0
        await asyncio.to_thread(own_postgres.start)
        await loads(service)
    await check_all(driver, service, database)


async def test_the_database_freezes_in_the_middle_of_a_load(
    own_server: Server, make_service: MakeService, seed: int
) -> None:
    """Of SQLite: another process is frozen while it writes there."""
    database = own_server.create_database()
    async with moments_of(database) as moments:
        service = moments.service(make_service, **OFTEN)

        async def freeze() -> bool:
            await asyncio.to_thread(own_server.freeze)
            return True

        async with under_load(service, seed) as driver:
            if database.startswith("sqlite:"):
                await freeze()  # between two loads
            else:
                await moments.at(Moment.COPY, freeze)
            loaded = len(service.logged("segments loaded"))
            await driver.answered(200)
            assert len(service.logged("segments loaded")) <= loaded + 1
            own_server.thaw()
            await loads(service)
        await check_all(driver, service, database)


async def test_backends_are_terminated_in_the_middle_of_copy(
    postgres: Postgres, proxy: Proxy, database: str, make_service: MakeService, seed: int
) -> None:
    service = make_service(database_url=proxy.url, **OFTEN)
    ended: list[int] = []

    async def terminate() -> bool:
        rows = await postgres.aexecute(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND query LIKE 'COPY%%' AND state = 'active'",
        )
        ended.append(len(rows))
        return True

    async with under_load(service, seed) as driver:
        for _ in range(5):
            await proxy.at(Moment.COPY, terminate)
            await loads(service)
    assert len(ended) == 5
    assert all(ended), ended
    await check_all(driver, service, database)
    assert service.logged("load failed")


@pytest.mark.parametrize("moment", [Moment.COMMIT, Moment.SENT, Moment.COMMITTED])
async def test_the_connection_breaks_around_commit(
    proxy: Proxy,
    database: str,
    make_service: MakeService,
    seed: int,
    moment: Moment,
) -> None:
    """Whether it happened is not known: what did happen counts as loaded, not as duplicate."""
    service = make_service(database_url=proxy.url, **OFTEN)

    async with under_load(service, seed) as driver:
        for _ in range(4):
            await proxy.at(moment, cut)
            await loads(service)
    await check_all(driver, service, database)
    if moment is not Moment.SENT:  # there the answer may have been faster
        assert len(service.logged("load failed")) >= 4


ONE = {"event_name": "install", "user_id": 1, "timestamp": 2}


@pytest.mark.parametrize(
    ("moment", "committed"), [(Moment.COMMIT, False), (Moment.COMMITTED, True)]
)
async def test_one_event_whose_commit_breaks_is_loaded_not_duplicate(
    any_database: str,
    moments: Moments,
    make_service: MakeService,
    moment: Moment,
    committed: bool,
) -> None:
    """Step by step: loaded, the request or the answer dropped, tried again."""
    service = moments.service(make_service, **OFTEN)
    await service.start()
    seen: list[int] = []

    async def count() -> int:
        rows = await aexecute(any_database, "SELECT count(*) FROM install")
        return int(rows[0][0])

    async def count_and_cut() -> bool:
        seen.append(await count())
        return False

    async with asyncio.TaskGroup() as both:
        both.create_task(moments.at(moment, count_and_cut))
        both.create_task(service.post(ONE))
    assert seen == [int(committed)]
    books = await service.drained()
    assert await count() == 1
    assert (books["accepted"], books["loaded"], books["duplicate"]) == (1, 1, 0)
    assert len(service.logged("load failed")) == 1


@pytest.mark.parametrize("any_database", ["postgres", "mariadb"], indirect=True)
async def test_a_commit_of_unknown_outcome_is_known_again_after_parking(moments: Moments) -> None:
    """A parked segment is read anew: what is known of its loads must not hang on the object."""
    table = Table("n", (Column("n", "bigint"), Column("received_at", "timestamptz")))

    def anew() -> Segment:
        row = b"1\t2026-01-01 12:00:00\n"
        return Segment("n", table.columns, row, 1, id="0" * 32)

    async with open_sink(Settings(database_url=moments.url), "a process") as sink:
        await sink.load(table, [Segment("n", table.columns, anew().data, 1)])
        async with asyncio.TaskGroup() as both:
            both.create_task(moments.at(Moment.COMMITTED, cut))
            with pytest.raises(SinkUnavailable):
                await sink.load(table, [anew()])
        again = await sink.load(table, [anew()])
        assert (again.loaded, again.duplicate) == (1, 0)
        third = await sink.load(table, [anew()])
        assert (third.loaded, third.duplicate) == (0, 1)
