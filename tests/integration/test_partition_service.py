"""Partitions and retention from the outside: a service, its page, and the commands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.integration.test_commands import Run, datapipe
from tests.postgres import Postgres
from tests.service import Service, until

__all__ = ["datapipe"]

VISIT = {"page": "str"}
QUICK = ["tests.fault.modules.quick_tables"]


def visits(**options: str) -> dict[str, Any]:
    return {"visit": {**VISIT, **{f"@{name}": value for name, value in options.items()}}}


async def test_a_service_makes_partitions_for_its_events_and_ahead(
    make_service: Callable[..., Service], datapipe: Run, database: str
) -> None:
    events = visits(partition="month", retention="90 days")
    service = await make_service(database_url=database, events=events, event_modules=QUICK).start()
    assert (await service.post({"event_name": "visit", "page": "/"}))[0] == 200
    assert (await service.load())["loaded"] == {"visit": 1}
    assert Postgres.execute(database, "SELECT page FROM visit") == [("/",)]
    count = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'visit'::regclass"

    async def made_ahead() -> bool:
        return Postgres.execute(database, count) == [(4,)]

    await until(made_ahead, what="partitions ahead")
    checked = await datapipe("check", database_url=database, events=events)
    assert checked.code == 0
    assert "ok    table visit: 4 partitions, the last until " in checked.out
    assert "ok    table visit: next to be removed: partition visit_p" in checked.out


async def test_a_table_that_was_there_before_is_adopted(
    make_service: Callable[..., Service], datapipe: Run, database: str
) -> None:
    Postgres.execute(
        database,
        "CREATE TABLE visit (page text, received_at timestamptz);"
        "INSERT INTO visit SELECT n, now() - interval '1 day' * n FROM generate_series(1, 60) n",
    )
    settings = {"database_url": database, "events": visits(retention="30 days")}
    service = await make_service(**settings, event_modules=QUICK).start()
    checked = await datapipe("check", **settings)
    assert checked.code == 0
    assert "to change that: datapipe schema --adopt visit" in checked.out
    refused = await datapipe("schema", "--adopt", "visit", **settings)
    assert refused.code == 1
    index = refused.one_line().partition("received_at: ")[2]
    Postgres.execute(database, index)
    assert Postgres.execute(database, "SELECT count(*) FROM visit") == [(60,)]
    adopted = await datapipe("schema", "--adopt", "visit", **settings)
    assert (adopted.code, adopted.err) == (0, "")
    assert "rows that were received before " in adopted.out

    async def left() -> int:
        return int(Postgres.execute(database, "SELECT count(*) FROM visit")[0][0])

    async def removed() -> bool:
        return await left() == 29

    await until(removed, what="removal of 31 rows")
    (line,) = service.logged("rows removed")
    assert (line["lane"], line["rows"]) == ("visit", 31)

    async def state_is(state: str) -> None:
        async def there() -> bool:
            return bool((await service.status())["summary"]["state"] == state)

        await until(there, what=state)

    Postgres.execute(database, "DROP INDEX visit_received_at")
    await state_is("tables_failing")
    assert "CREATE INDEX CONCURRENTLY" in (await service.status())["summary"]["text"]
    Postgres.execute(database, index)
    await state_is("healthy")


async def test_what_can_not_be_adopted(datapipe: Run, database: str) -> None:
    settings = {"database_url": database, "events": visits(retention="30 days")}
    nothing = await datapipe("schema", "--adopt", "visit", **settings)
    assert (nothing.code, nothing.out) == (1, "")
    assert "visit: there is none" in nothing.one_line()
    unknown = await datapipe("schema", "--adopt", "nobody", **settings)
    assert (unknown.code, unknown.out) == (2, "")
    assert "'nobody'" in unknown.one_line()
