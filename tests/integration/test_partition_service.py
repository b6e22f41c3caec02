"""Partitions and retention from the outside: a service, its page, and the commands beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from datapipe.cli import commands
from datapipe.errors import ConfigError, LaneBlocked
from datapipe.settings import Settings
from tests.integration.test_commands import Run, datapipe
from tests.postgres import Postgres
from tests.service import Service, until

__all__ = ["datapipe"]

EVENTS = {
    "visit": {"page": "str", "@partition": "month", "@retention": "90 days"},
    "hit": {"page": "str", "@retention": "30 days"},
}


async def test_a_service_looks_after_its_tables_and_those_that_it_adopted(
    make_service: Callable[..., Service], datapipe: Run, database: str
) -> None:
    """Partitions of the one are made at a load, and ahead; the other was there before."""
    Postgres.execute(
        database,
        "CREATE TABLE hit (page text, received_at timestamptz);"
        "INSERT INTO hit SELECT n, now() - interval '1 day' * n FROM generate_series(1, 60) n",
    )
    settings = {"database_url": database, "events": EVENTS}
    service = await make_service(
        **settings, event_modules=["tests.fault.modules.quick_tables"]
    ).start()
    assert (await service.post({"event_name": "visit", "page": "/"}))[0] == 200
    assert (await service.load())["loaded"] == {"visit": 1}
    assert Postgres.execute(database, "SELECT page FROM visit") == [("/",)]

    async def count(table: str, wanted: int) -> None:
        async def there() -> bool:
            return Postgres.execute(database, f"SELECT count(*) FROM {table}") == [(wanted,)]

        await until(there, what=f"{wanted} of {table}")

    await count("pg_inherits WHERE inhparent = 'visit'::regclass", 4)
    checked = await datapipe("check", **settings)
    assert checked.code == 0
    assert "ok    table visit: 4 partitions, the last until " in checked.out
    assert "ok    table visit: next to be removed: partition visit_p" in checked.out
    assert "to change that: datapipe schema --adopt hit" in checked.out

    refused = await datapipe("schema", "--adopt", "hit", **settings)
    assert refused.code == 1
    index = refused.one_line().partition("received_at: ")[2]
    Postgres.execute(database, index)
    await count("hit", 60)
    adopted = await datapipe("schema", "--adopt", "hit", **settings)
    assert (adopted.code, adopted.err) == (0, "")
    assert "rows that were received before " in adopted.out
    await count("hit", 29)
    await until(lambda: logged(service, "rows removed"), what="a line of the log")
    (line,) = service.logged("rows removed")
    assert (line["lane"], line["rows"]) == ("hit", 31)

    Postgres.execute(database, "DROP INDEX hit_received_at_idx")
    await state_is(service, "tables_failing")
    assert "CREATE INDEX CONCURRENTLY" in (await service.status())["summary"]["text"]
    Postgres.execute(database, index)
    await state_is(service, "healthy")


async def logged(service: Service, event: str) -> bool:
    return bool(service.logged(event))


async def state_is(service: Service, state: str) -> None:
    async def there() -> bool:
        return bool((await service.status())["summary"]["state"] == state)

    await until(there, what=state)


async def test_what_can_not_be_adopted(database: str) -> None:
    settings = Settings(database_url=database, events=EVENTS)
    with pytest.raises(LaneBlocked, match="table visit: there is none"):
        await commands.schema(settings, argparse.Namespace(adopt=["visit"], apply=False))
    with pytest.raises(ConfigError, match="'nobody'"):
        await commands.schema(settings, argparse.Namespace(adopt=["nobody"], apply=False))
