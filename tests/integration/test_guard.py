"""When a table is taken to be wrong, and when its rows: partitions, small loads, the language."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.fault.moments import Moment
from tests.fault.proxy import Proxy
from tests.postgres import Postgres
from tests.service import Service, until

Make = Callable[..., Service]

NEVER = {"load_interval": 3600, "load_min_interval": 3600}  # loads are asked for
KEEP_ODD = "ALTER TABLE install ADD CONSTRAINT even CHECK (user_id % 2 = 0)"
MEND = "ALTER TABLE install DROP CONSTRAINT even"


def install(user: int) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user, "timestamp": 1}


async def lane(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = (await service.status())["lanes"]["install"]
    return found


async def healed(service: Service) -> None:
    async def told() -> bool:
        return bool(service.logged("lane healed"))

    await until(told, what="a healed lane")
    assert (await lane(service))["blocked"] is None


async def load(service: Service, odd: int, even: int = 0) -> dict[str, Any]:
    """Post and load them; the answer of `POST /load`."""
    status, _ = await service.post([install(1)] * odd + [install(2)] * even)
    assert status == 200
    return await service.load("?lane=install")


@pytest.fixture
async def service(make_service: Make, database: str, postgres: Postgres) -> Service:
    """A service that loads when it is asked to; its table refuses odd users."""
    made = await make_service(database_url=database, **NEVER).start()
    assert await load(made, 0, even=1) == {"loaded": {"install": 1}, "failed": {}}
    postgres.execute(database, KEEP_ODD)
    return made


async def test_small_loads_that_are_refused_block_the_lane(
    service: Service, postgres: Postgres, database: str
) -> None:
    for _ in range(9):
        assert (await load(service, 10, even=2))["failed"] == {}
    answer = await load(service, 10, even=2)
    assert answer["failed"]["install"].startswith("blocked: the table refuses 100 of 120 rows: ")
    told = await lane(service)
    assert (told["dead"], told["waiting"], told["loaded"]) == (90, 12, 19)
    assert postgres.execute(database, "SELECT count(*) FROM datapipe_dead_letters") == [(90,)]
    assert (await load(service, 0, even=1))["failed"]  # as long as the table is what it is

    postgres.execute(database, MEND)
    assert (await service.load("?lane=install"))["failed"] == {}
    told = await lane(service)
    assert (told["blocked"], told["dead"], told["waiting"]) == (None, 90, 0)
    await healed(service)
    # counting starts afresh: what was refused before the table was mended is past
    postgres.execute(database, KEEP_ODD + " NOT VALID")
    assert (await load(service, 99))["failed"] == {}
    assert (await load(service, 1))["failed"]


async def test_what_an_admin_lets_through_counts_no_more(service: Service) -> None:
    for _ in range(9):
        await load(service, 11)
    assert (await load(service, 1))["failed"]
    assert (await service.load("?lane=install&accept=dead"))["failed"] == {}
    assert (await lane(service))["dead"] == 100
    assert (await load(service, 99))["failed"] == {}
    assert (await load(service, 1))["failed"]
    assert (await service.status())["books"]["balanced"]


async def test_what_an_admin_lets_through_during_a_load_has_a_try_of_its_own(
    make_service: Make, database: str, postgres: Postgres
) -> None:
    """The load under way is refused: that is not the answer to who came meanwhile."""
    async with Proxy(database).running() as proxy:
        service = await make_service(database_url=proxy.url, **NEVER).start()
        assert (await load(service, 0, even=1))["failed"] == {}
        postgres.execute(database, KEEP_ODD)
        assert (await service.post([install(1)] * 100))[0] == 200
        accepting: list[asyncio.Task[Any]] = []

        async def accept() -> bool:
            accepting.append(asyncio.create_task(service.load("?lane=install&accept=dead")))
            for _ in range(10):  # whatever else waits to be done is done meanwhile
                assert (await service.get("/healthz"))[0] == 200
            return True

        async with asyncio.TaskGroup() as both:
            both.create_task(proxy.at(Moment.COPY, accept))
            refused = both.create_task(service.load("?lane=install"))
        why = refused.result()["failed"]["install"]
        assert why.startswith("blocked: the table refuses 100 of 100 rows")
        assert await accepting[0] == {"loaded": {}, "failed": {}}
        told = await lane(service)
        assert (told["blocked"], told["dead"], told["waiting"]) == (None, 100, 0)
        await service.stop()


async def test_loads_that_are_mostly_right_block_nothing(service: Service) -> None:
    """Neither does one bad load long ago, nor do good ones before it excuse those of today."""
    for _ in range(15):
        assert (await load(service, 10, even=10))["failed"] == {}
    assert (await load(service, 0, even=200))["failed"] == {}
    assert (await load(service, 90))["failed"] == {}  # 100 of 310: the last of them but 10 and 200
    assert (await load(service, 9))["failed"] == {}
    assert (await load(service, 1))["failed"]["install"].startswith(
        "blocked: the table refuses 100 of 100 rows"
    )


async def test_a_restart_counts_afresh(service: Service) -> None:
    assert (await load(service, 99))["failed"] == {}
    await service.stop()
    await service.start()
    assert (await load(service, 99))["failed"] == {}
    assert (await load(service, 1))["failed"]


# --- partitions ---

PARTITIONED = (
    "CREATE TABLE install (user_id bigint, timestamp bigint, received_at timestamptz)"
    " PARTITION BY {key}"
)
EXTRA = (
    "CREATE TABLE install (user_id bigint, timestamp bigint, received_at timestamptz,"
    " shard int DEFAULT 7) PARTITION BY {key}"
)
OLD = "CREATE TABLE old PARTITION OF install FOR VALUES {values}"
REST = "CREATE TABLE rest PARTITION OF {of} DEFAULT"
SUB = (
    "CREATE TABLE small PARTITION OF install FOR VALUES FROM (0) TO (1000)"
    " PARTITION BY RANGE (received_at)"
)


@pytest.mark.parametrize(
    ("table", "of"),
    [
        (PARTITIONED.format(key="RANGE (received_at)") + ";"
         + OLD.format(values="FROM ('2020-01-01') TO ('2020-01-02')"), "install"),
        (PARTITIONED.format(key="RANGE (date_trunc('day', received_at AT TIME ZONE 'UTC'))"),
         "install"),
        (EXTRA.format(key="LIST (shard)"), "install"),
        (PARTITIONED.format(key="RANGE (user_id)") + ";" + SUB, "small"),
    ],
    ids=["day", "expression", "column_of_others", "within_a_partition"],
)  # fmt: skip
async def test_a_missing_partition_is_no_fault_of_a_row(
    make_service: Make, postgres: Postgres, database: str, table: str, of: str
) -> None:
    postgres.execute(database, table)
    service = await make_service(database_url=database, **NEVER).start()
    for n in range(1, 4):
        answer = await load(service, 1)
        assert answer["failed"]["install"].endswith("(SQLSTATE 23514)")
        told = await lane(service)
        assert (told["dead"], told["waiting"], told["in_memory"]) == (0, n, 0)
    postgres.execute(database, REST.format(of=of))
    assert await service.load("?lane=install") == {"loaded": {"install": 3}, "failed": {}}
    await healed(service)


async def test_no_client_blocks_a_lane_by_a_value_without_a_partition(
    make_service: Make, postgres: Postgres, database: str
) -> None:
    table = PARTITIONED.format(key="RANGE (user_id)")
    postgres.execute(database, table + ";" + OLD.format(values="FROM (0) TO (1000)"))
    service = await make_service(database_url=database, **NEVER).start()
    await service.post([install(5), install(10**15), install(6)])
    assert await service.load() == {"loaded": {"install": 2}, "failed": {}}
    told = await lane(service)
    assert (told["dead"], told["blocked"]) == (1, None)


async def test_a_violated_check_of_a_partitioned_table_is_a_fault_of_the_row(
    make_service: Make, postgres: Postgres, database: str
) -> None:
    postgres.execute(database, PARTITIONED.format(key="RANGE (received_at)"))
    postgres.execute(database, REST.format(of="install") + ";" + KEEP_ODD)
    service = await make_service(database_url=database, **NEVER).start()
    assert await load(service, 1, even=2) == {"loaded": {"install": 2}, "failed": {}}
    assert (await lane(service))["dead"] == 1


# --- the server's language ---

TRIGGER = (
    "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {code} END$$;"
    "CREATE TRIGGER t {when} FOR EACH {each} EXECUTE FUNCTION f()"
)
RAISE = "RAISE 'no' USING ERRCODE = 'ZZ001';"
OF_ONE = f"IF NEW.user_id = 13 THEN {RAISE} END IF; RETURN NEW;"
# Source: PostgreSQL's catalogs, src/backend/po, of the message "COPY %s, line %llu, column %s".
# English stands first; `n` is the line.
TRANSLATED = {
    "en": ("COPY install, line {n}", ", column user_id"),
    "de": ("COPY install, Zeile {n}", ", Spalte user_id"),
    "ja": ("install\u306eCOPY\u3001\u884c {n}", "\u3001\u5217 user_id"),
    "ko": ("install \ubcf5\uc0ac, {n}\ubc88\uc9f8 \uc904", ", user_id \uc5f4"),
}


@pytest.mark.parametrize("language", TRANSLATED)
async def test_the_row_is_found_in_any_language(
    make_service: Make, postgres: Postgres, database: str, language: str
) -> None:
    """A trigger's own SQLSTATE, and a value of the wrong type with its column."""
    proxy = Proxy(database)
    line, column = TRANSLATED[language]

    def translated(text: str) -> str:
        told = re.sub(r"COPY install, line (\d+)", lambda m: line.format(n=m[1]), text)
        return told.replace(", column user_id", column)

    proxy.translate = translated
    async with proxy.running():
        service = await make_service(database_url=proxy.url, **NEVER).start()
        await load(service, 0, even=1)
        postgres.execute(
            database, TRIGGER.format(code=OF_ONE, when="BEFORE INSERT ON install", each="ROW")
        )
        postgres.execute(database, "ALTER TABLE install ALTER user_id TYPE int")
        await service.post([install(n) for n in (*range(10, 30), 10**12)])
        assert await service.load() == {"loaded": {"install": 19}, "failed": {}}
        _, found = await service.get("/dead")
        told = [(e["event"]["user_id"], e["sqlstate"], e["column_name"]) for e in found["letters"]]
        assert sorted(told) == [(13, "ZZ001", None), (10**12, "22003", "user_id")]
        await service.stop()


@pytest.mark.parametrize("state", ["ZZ001", "P0001", "23514"])
async def test_what_refuses_even_no_rows_is_no_fault_of_a_row(
    service: Service, postgres: Postgres, database: str, state: str
) -> None:
    code = f"RAISE 'closed' USING ERRCODE = '{state}';"
    postgres.execute(
        database, TRIGGER.format(code=code, when="BEFORE INSERT ON install", each="STATEMENT")
    )
    assert (await load(service, 0, even=3))["failed"] == {
        "install": f"blocked: closed (SQLSTATE {state})"
    }
    assert (await lane(service))["dead"] == 0
    postgres.execute(database, "DROP TRIGGER t ON install")
    assert (await service.load())["loaded"] == {"install": 3}


async def test_a_code_of_nobodys_after_the_row_is_a_fault_of_the_row(
    service: Service, postgres: Postgres, database: str
) -> None:
    """PostgreSQL tells no line there, in any language."""
    postgres.execute(
        database, TRIGGER.format(code=OF_ONE, when="AFTER INSERT ON install", each="ROW")
    )
    postgres.execute(database, MEND)
    await service.post([install(n) for n in range(10, 30)])
    assert await service.load() == {"loaded": {"install": 19}, "failed": {}}
    _, found = await service.get("/dead")
    assert [letter["event"]["user_id"] for letter in found["letters"]] == [13]
