"""A host loses power in the middle of COPY: the server hears nothing, and lets go of the lane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2
import pytest

from tests.fault.link import Link
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
QUICK = {"event_modules": ["tests.fault.modules.quick_keepalives"], "load_interval": 0.2}
EVENT = {"event_name": "install", "user_id": 1, "timestamp": 2}


@pytest.fixture
def link() -> Iterator[Link]:
    with Link.up() as link:
        yield link


@pytest.fixture
def postgres_beyond(link: Link) -> Iterator[Postgres]:
    """A server that both a host of its own and this one reach."""
    server = Postgres(listen_addresses=f"127.0.0.1,{link.here}")
    try:
        server.admit(link.there)
        server.start()
        yield server
    finally:
        server.remove()


@pytest.mark.needs_root
async def test_a_host_loses_power_in_the_middle_of_copy(
    link: Link, postgres_beyond: Postgres, make_service: MakeService
) -> None:
    """Its session holds the lane's lock; the same journal elsewhere stands for its messages."""
    database = postgres_beyond.create_database()
    lost = make_service(
        database_url=database.replace("127.0.0.1", link.here),
        host=link.there, inside=link.inside, **QUICK,
    )  # fmt: skip
    await lost.start()
    assert (await lost.post(EVENT))[0] == 200
    await lost.drained()
    with locked(database, "install"):  # so that COPY has begun, and no data has come
        assert (await lost.post(EVENT))[0] == 200
        await session_is(postgres_beyond, database, "wait_event_type = 'Lock'")
        link.cut()
        await lost.kill()
    await session_is(postgres_beyond, database, "wait_event = 'ClientRead'")

    other = await make_service(database_url=database, **QUICK).start()

    async def loaded() -> bool:
        return bool(other.logged("segments loaded"))

    async def ended() -> bool:
        sql = "SELECT 1 FROM pg_stat_activity WHERE client_addr = %s"
        return not await postgres_beyond.aexecute(database, sql, link.there)

    await until(loaded, 30, "a load of what the lost host had in hand")
    await until(ended, 15, "the end of its sessions, the idle ones too")
    assert await postgres_beyond.aexecute(database, "SELECT count(*) FROM install") == [(2,)]


@contextmanager
def locked(database: str, table: str) -> Iterator[None]:
    """A table that nobody else can use, as long as the block lasts."""
    connection = psycopg2.connect(database)
    try:
        connection.cursor().execute(f"LOCK TABLE {table}")
        yield
    finally:
        connection.close()


async def session_is(postgres: Postgres, database: str, condition: str) -> None:
    """Wait until a session is in a COPY, and so."""
    sql = (
        "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'COPY%' AND state = 'active'"
        f" AND {condition}"
    )

    async def there() -> bool:
        return bool(await postgres.aexecute(database, sql))

    await until(there, what=f"a session in a COPY: {condition}")
