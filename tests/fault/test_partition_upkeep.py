"""Partitions are made and removed under load, while processes are killed and somebody reads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import psycopg2

from datapipe.events.registry import load_registry
from datapipe.settings import Settings
from datapipe.sinks import open_sink, table_of
from tests.databases import aexecute
from tests.fault.driver import LANES, Driver
from tests.fault.kills import drained
from tests.service import Service, until

KEPT = {"user_id": "int", "timestamp": "int", "@partition": "day", "@retention": "30 days"}
EVENTS = {
    "crash_report": {**KEPT, "message": "str"},
    "purchase": {**KEPT, "sku": "str"},
    "install": KEPT,
}
OLD = 3  # partitions of each table that are to go
KILLS = 2


async def make_old(database: str, lane: str) -> None:
    """Partitions of days that are over for long, with rows."""
    today = datetime.now(UTC).date()
    for number in range(40, 40 + OLD):
        day, following = (today - timedelta(days=days) for days in (number, number - 1))
        await aexecute(
            database,
            f"CREATE TABLE old_{lane}_{number} PARTITION OF {lane}"
            f" FOR VALUES FROM ('{day} 00:00Z') TO ('{following} 00:00Z');"
            f"INSERT INTO {lane} (user_id, received_at) SELECT -1, '{day} 12:00Z'"
            " FROM generate_series(1, 100)",
        )


@asynccontextmanager
async def reading(database: str) -> AsyncIterator[None]:
    """Somebody whose transactions read all of the tables, some for longer than others."""

    async def read() -> None:
        while True:
            connection = await asyncio.to_thread(psycopg2.connect, database)
            cursor = connection.cursor()
            for lane in LANES:
                await asyncio.to_thread(cursor.execute, f"SELECT count(*) FROM {lane}")
            await asyncio.sleep(random.choice([0.0, 0.1, 1.1]))
            connection.rollback()
            connection.close()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_made_and_removed_under_load_while_processes_are_killed(
    database: str, make_service: Callable[..., Service], seed: int
) -> None:
    chance = random.Random(seed)
    modules = ["quick_recovery", "wandering_clock"]
    common = {
        "database_url": database, "events": EVENTS, "load_interval": 0.1, "load_min_interval": 0,
        "event_modules": [f"tests.fault.modules.{name}" for name in modules],
    }  # fmt: skip
    services = [make_service(**common) for _ in range(2)]
    await asyncio.gather(*(service.start() for service in services))
    settings = Settings(database_url=database, events=EVENTS)
    async with open_sink(settings, "test") as sink:
        for lane in LANES:
            await sink.prepare(table_of(load_registry(settings).types[lane]))
    driver = Driver(lambda: chance.choice(services).url, seed, connections=8)
    async with driver.running(), reading(database):
        for lane in LANES:
            await make_old(database, lane)
        for _ in range(KILLS):
            await driver.answered(chance.randint(20, 60))
            victim = chance.choice(services)
            await victim.kill()
            await victim.start()

        async def gone() -> bool:
            sql = "SELECT count(*) FROM pg_class WHERE relname LIKE 'old%%' AND relkind = 'r'"
            return await aexecute(database, sql) == [(0,)]

        await until(gone, 60, "the end of all that is too old")
    await driver.settle()
    for service in services:
        await drained(service)
    verdict = await driver.check(database)
    assert (verdict.dead, verdict.rows > 500) == (0, True), verdict
    for lane in LANES:
        sql = f"SELECT count(DISTINCT tableoid) FROM {lane}"
        assert await aexecute(database, sql) in ([(13,)], [(14,)])  # a midnight
