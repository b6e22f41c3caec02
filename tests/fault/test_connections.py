"""Statements that the server cancels, connections that break, a database that takes no writes."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psycopg2
import pytest
import uvloop

from datapipe.errors import SinkUnavailable
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Table, open_sink
from tests.fault.files import churn
from tests.fault.ironmq_process import running_queue
from tests.fault.test_database import OFTEN, check_all, loads, summary_is, under_load
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
QUICK = ["tests.fault.modules.quick_watch"]  # a beat each 0.2 s
READ_ONLY = "default_transaction_read_only"
CRASH = {"event_name": "crash_report", "user_id": 1, "timestamp": 2, "message": "it broke"}
INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 2}


@contextmanager
def transaction(database: str, *statements: str) -> Iterator[None]:
    """Somebody else's transaction, open as long as the block lasts."""
    connection = psycopg2.connect(database)
    try:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        yield
    finally:
        connection.close()


async def beats(postgres: Postgres, database: str) -> int:
    """Of all processes together."""
    rows = await postgres.aexecute(
        database, "SELECT coalesce(sum(beats), 0) FROM datapipe_processes"
    )
    return int(rows[0][0])


async def goes_on_beating(postgres: Postgres, database: str, timeout_s: float = 15.0) -> None:
    before = await beats(postgres, database)

    async def more() -> bool:
        return await beats(postgres, database) >= before + 3

    await until(more, timeout_s, "more heartbeats")


async def made(postgres: Postgres, database: str, make_service: MakeService) -> None:
    """All tables, and nothing in them."""
    service = await make_service(database_url=database).start()
    await service.post([CRASH, INSTALL])
    await service.drained()
    assert await service.stop() == 0
    postgres.execute(database, "TRUNCATE crash_report, install")


async def throw_out(postgres: Postgres, database: str) -> None:
    """End all sessions, as a failover does."""
    await postgres.aexecute(
        postgres.url("postgres"),
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
        database.rsplit("/", 1)[1],
    )


async def cancelled(postgres: Postgres, database: str, like: str) -> bool:
    """Cancel what waits for a lock; whether there was something."""
    rows = await postgres.aexecute(
        database,
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE %s"
        " AND datname = current_database() AND wait_event_type = 'Lock'",
        like,
    )
    return any(ended for (ended,) in rows)


# --- statements that the server cancels ---


async def test_a_new_column_whose_statement_is_cancelled_comes_later(
    postgres: Postgres, database: str, make_service: MakeService
) -> None:
    """Each ALTER that waits for a lock is cancelled by a person; other lanes load meanwhile."""
    await made(postgres, database, make_service)
    postgres.execute(database, "ALTER TABLE crash_report DROP COLUMN message")
    service = make_service(database_url=database, event_modules=QUICK, **OFTEN)
    with transaction(database, "LOCK TABLE crash_report IN ACCESS SHARE MODE"):
        await service.start()
        assert (await service.post(CRASH))[0] == 200
        for number in range(4):
            await until(
                lambda: cancelled(postgres, database, "ALTER TABLE%"), 40, "an ALTER that waits"
            )
            loading = asyncio.create_task(loads(service, 1))  # it may be loaded with the answer
            assert (await service.post({**INSTALL, "user_id": number}))[0] == 200
            await loading
        await goes_on_beating(postgres, database)
    books = await service.drained(40)
    assert (books["loaded"], books["balanced"]) == (5, True)
    assert postgres.execute(database, "SELECT message FROM crash_report") == [("it broke",)]
    assert not service.logged("background task died")
    assert not service.logged("database down")
    assert await service.stop() == 0


@pytest.mark.parametrize("clients", [0, 1100])
async def test_a_statement_timeout_ends_no_heartbeat_and_no_answer(
    postgres: Postgres, database: str, make_service: MakeService, clients: int
) -> None:
    """`statement_timeout` of the database meets what waits for a lock.

    With so many clients a descriptor that is opened now has a number that `select` can't take.
    """
    await made(postgres, database, make_service)
    name = database.rsplit("/", 1)[1]
    postgres.execute(database, f"ALTER DATABASE {name} SET statement_timeout = '300ms'")
    service = await make_service(database_url=database, event_modules=QUICK, **OFTEN).start()
    await goes_on_beating(postgres, database)
    allow = f"ALTER DATABASE {name} ALLOW_CONNECTIONS"
    await postgres.aexecute(postgres.url("postgres"), f"{allow} false")
    await throw_out(postgres, database)
    await summary_is(service, "database_down")
    with idle_clients(service, clients):
        await postgres.aexecute(postgres.url("postgres"), f"{allow} true")
        await summary_is(service, "healthy")
        await goes_on_beating(postgres, database)
        await heartbeat_is_cancelled(service, database)
        await goes_on_beating(postgres, database)
    assert (await service.get("/dead"))[0] == 200
    loading = asyncio.create_task(loads(service, 1))
    assert (await service.post(INSTALL))[0] == 200
    await loading
    assert len(service.logged("database down")) == 1  # as the sessions were thrown out
    assert await service.stop() == 0


@contextmanager
def idle_clients(service: Service, count: int) -> Iterator[None]:
    """Connections that send nothing, while the service, and we, may open so many."""
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (most, most))
    host, port = service.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (usual, most))
        for _ in range(count):
            stack.enter_context(socket.create_connection((host, int(port))))
        yield


async def heartbeat_is_cancelled(service: Service, database: str) -> None:
    """And what else waits for the lock: it is answered, and says why."""
    with transaction(database, "LOCK TABLE datapipe_processes, datapipe_dead_letters"):

        async def told() -> bool:
            return bool(service.logged("heartbeat failed"))

        await until(told, what="a heartbeat that failed")
        async with service.session.get(f"{service.url}/") as page:
            assert page.status == 200
        status, answer = await service.get("/dead")
        assert (status, answer["status_code"]) == (503, 9)
        assert "statement timeout" in answer["status_message"]


async def test_a_background_task_that_is_cancelled_by_nobody_ends_the_service(
    database: str, make_service: MakeService
) -> None:
    service = make_service(database_url=database, event_modules=["tests.fault.modules.cancelled"])
    await service.start()
    assert await service.wait(20) == 1
    (died,) = service.logged("background task died")
    assert "cancelled" in str(died)


# --- connections that break ---


async def test_no_broken_connection_takes_the_number_of_a_new_one(
    own_postgres: Postgres, make_service: MakeService, seed: int
) -> None:
    """The database ends while others take its sockets' numbers, and connections to IronMQ come."""
    database = own_postgres.create_database()
    async with running_queue() as queue:
        modules = [*QUICK, "tests.fault.modules.descriptors"]
        service = make_service(
            database_url=database, **queue.settings, event_modules=modules, **OFTEN
        )
        async with under_load(service, seed) as driver:
            for _ in range(2):
                await asyncio.gather(*(service.get("/dead") for _ in range(4)))
                await asyncio.to_thread(own_postgres.stop)
                await summary_is(service, "database_down")
                await queue.order(faults=[{"what": "reset", "n": 30}], latency=0.05)
                await driver.answered(50)  # on as many connections as there can be
                await queue.order(latency=0)
                await asyncio.to_thread(own_postgres.start)
                await loads(service)
        await driver.settle()
        await service.drained(60)
        verdict = await driver.compare(database)
        verdict.refused_stored.clear()
        verdict.check()
        assert not service.logged("fault"), service.logged("fault")
        assert await service.stop() == 0


def test_no_number_of_a_broken_connection_stays_with_the_loop(own_postgres: Postgres) -> None:
    """Step by step, in this process: what can't connect leaves nothing to who connects next."""
    uvloop.run(break_and_connect(own_postgres, own_postgres.create_database(), 5))


async def break_and_connect(postgres: Postgres, database: str, times: int) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with open_sink(Settings(database_url=database), "a process") as sink:
            await sink.prepare(Table("n", (Column("n", "bigint"),)))
            for _ in range(times):
                assert await sink.loaded(["0"]) == set()
                await asyncio.to_thread(postgres.stop)
                with files_come_and_go(), pytest.raises(SinkUnavailable):
                    await sink.loaded(["0"])
                with ExitStack() as clients:
                    for _ in range(10):
                        client = clients.enter_context(socket.socket())
                        client.setblocking(False)
                        await loop.sock_connect(client, server.getsockname())
                        clients.enter_context(server.accept()[0])
                await asyncio.to_thread(postgres.start)


async def test_of_several_addresses_the_one_that_answers_is_found_again(
    own_postgres: Postgres, postgres: Postgres
) -> None:
    hosts = f"127.0.0.1:{own_postgres.port},127.0.0.1:{postgres.port}"
    settings = Settings(database_url=f"postgresql://postgres@{hosts}/postgres")
    async with open_sink(settings, "a process") as sink:
        assert next(level for level, _ in await sink.check([])) == "ok"
        await asyncio.to_thread(own_postgres.stop)
        assert next(level for level, _ in await sink.check([])) == "ok"


@contextmanager
def files_come_and_go() -> Iterator[None]:
    """In another thread, as long as the block lasts."""
    ending = threading.Event()
    thread = threading.Thread(target=churn, args=(ending.is_set,))
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


# --- a database that takes no writes ---


async def test_a_database_that_was_read_only_for_a_while_is_loaded_again(
    postgres: Postgres, database: str, make_service: MakeService, seed: int
) -> None:
    """As a standby behind the address for some seconds; it is told once, and over once."""
    name = database.rsplit("/", 1)[1]
    service = make_service(database_url=database, event_modules=QUICK, **OFTEN)
    async with under_load(service, seed) as driver:
        await postgres.aexecute(
            postgres.url("postgres"), f"ALTER DATABASE {name} SET {READ_ONLY} = on"
        )
        await throw_out(postgres, database)
        await summary_is(service, "database_down")
        for _ in range(10):
            status, answer = await service.get("/dead")
            assert status == 200, answer  # reading works all the while
            await driver.answered(20)
        assert (await service.status())["summary"]["state"] == "database_down"
        # nobody is thrown out now: what is read-only must go by itself
        await postgres.aexecute(
            postgres.url("postgres"), f"ALTER DATABASE {name} RESET {READ_ONLY}"
        )
        async with asyncio.timeout(10):
            await loads(service)
        await summary_is(service, "healthy")
    await check_all(driver, service, database)
    told = [line["event"] for line in service.lines if line["event"].startswith("database ")]
    assert told == ["database up", "database down", "database up"]
    assert await service.stop() == 0


# --- one table that can't be changed now ---


async def test_a_table_that_can_not_be_changed_now_holds_up_no_heartbeat_and_no_takeover(
    postgres: Postgres, database: str, make_service: MakeService
) -> None:
    """A new column waits for somebody's long SELECT; a neighbour dies meanwhile."""
    await made(postgres, database, make_service)
    postgres.execute(database, "ALTER TABLE crash_report DROP COLUMN message")
    async with running_queue() as queue:
        shared = {"database_url": database, **queue.settings, "event_modules": QUICK}
        neighbour = await make_service(
            **{**shared, "load_interval": 3600, "load_min_interval": 3600}
        ).start()
        assert (await neighbour.post([INSTALL] * 5))[0] == 200
        with transaction(database, "LOCK TABLE crash_report IN ACCESS SHARE MODE"):
            service = await make_service(**shared, **OFTEN).start()
            await goes_on_beating(postgres, database)
            await neighbour.kill()

            async def taken_over() -> bool:
                rows = await postgres.aexecute(database, "SELECT count(*) FROM install")
                return bool(rows == [(5,)])

            await until(taken_over, 30, "the neighbour's events in their table")
        assert (await service.post(CRASH))[0] == 200
        await service.drained(40)
        assert postgres.execute(database, "SELECT message FROM crash_report") == [("it broke",)]
        assert await service.stop() == 0
