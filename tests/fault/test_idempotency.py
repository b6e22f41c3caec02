"""One `Idempotency-Key`, sent again and again whatever happens: its body counts once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.fault.moments import Moment
from tests.fault.proxy import Proxy
from tests.postgres import Postgres
from tests.service import Service
from tests.wire import crash, purchase

MakeService = Callable[..., Service]
COUNT = 1500  # over two lanes and some parts


def body(mark: str) -> bytes:
    return json.dumps(
        [(crash, purchase)[n % 2](f"{mark} {n:040}", n) for n in range(COUNT)]
    ).encode()


def stored(database: str) -> dict[str, tuple[int, int]]:
    """Rows, and different ones, by the mark of the body."""
    rows = Postgres.execute(
        database,
        "SELECT split_part(t, ' ', 1), count(*), count(DISTINCT t) FROM (SELECT message AS t"
        " FROM crash_report UNION ALL SELECT sku FROM purchase) AS everything GROUP BY 1",
    )
    return {mark: (count, distinct) for mark, count, distinct in rows}


async def send(service: Service, mark: str, key: str = "k") -> int:
    """The status; 0: no answer."""
    try:
        return (await service.post(body(mark), headers={"Idempotency-Key": key}))[0]
    except (aiohttp.ClientError, OSError):
        return 0


async def counted_once(services: list[Service], database: str, answers: int) -> None:
    """The body is in once, and each more answer of 200 is a duplicate in the books."""
    books: list[dict[str, Any]] = [await service.drained() for service in services]
    assert stored(database) == {"a": (COUNT, COUNT)}
    assert all(each["balanced"] for each in books), books
    came = sum(each["accepted"] + each["recovered"] for each in books)
    assert came >= answers * COUNT
    assert sum(each["loaded"] for each in books) == COUNT, books
    assert sum(each["duplicate"] for each in books) == came - COUNT, books


async def test_at_once_on_50_connections(database: str, make_service: MakeService) -> None:
    service = await make_service(
        database_url=database, load_interval=0.1, load_min_interval=0, load_trigger_bytes=20_000,
        inflight_max_bytes=1 << 30,
    ).start()  # fmt: skip
    statuses = await asyncio.gather(*(send(service, "a") for _ in range(50)))
    assert statuses == [200] * 50
    await counted_once([service], database, 50)


async def test_across_crashes(proxy: Proxy, database: str, make_service: MakeService) -> None:
    """Killed before, in the middle of and behind the load of it, and sent again each time."""
    service = await make_service(
        database_url=proxy.url, load_interval=0.1, load_min_interval=0, load_trigger_bytes=20_000
    ).start()
    for moment in (Moment.COPY, Moment.COMMIT, Moment.SENT, Moment.COMMITTED, Moment.TOLD):

        async def kill() -> bool:
            os.kill(service.pid, signal.SIGKILL)
            return True

        async with asyncio.TaskGroup() as both:
            both.create_task(proxy.at(moment, kill))
            both.create_task(send(service, "a"))
        await service.kill()
        await service.start()
    assert await send(service, "a") == 200
    await service.drained()
    assert stored(database) == {"a": (COUNT, COUNT)}
    assert (await service.status())["books"]["balanced"]


async def two(database: str, make_service: MakeService, folder: Path) -> list[Service]:
    """Two processes that share nothing but the database."""
    services = [
        make_service(
            database_url=database, load_interval=0.1, load_trigger_bytes=20_000,
            data_dir=str(folder / name),
        )
        for name in ("one", "two")
    ]  # fmt: skip
    await asyncio.gather(*(service.start() for service in services))
    return services


async def test_by_two_processes_at_once(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    services = await two(database, make_service, tmp_path)
    statuses = await asyncio.gather(*(send(services[n % 2], "a") for n in range(10)))
    assert statuses == [200] * 10
    await counted_once(services, database, 10)


async def test_another_body_under_the_same_key(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    """One of them stands as a whole, whichever process loads which; all are answered 200."""
    services = await two(database, make_service, tmp_path)
    for number in range(3):
        marks = [f"{number}{name}" for name in "abcdef"]
        statuses = await asyncio.gather(
            *(send(services[n % 2], mark, f"k{number}") for n, mark in enumerate(marks * 2))
        )
        assert statuses == [200] * 12
    books = [await service.drained() for service in services]
    found = stored(database)
    assert sorted(mark[0] for mark in found) == ["0", "1", "2"], found
    assert set(found.values()) == {(COUNT, COUNT)}
    assert all(each["balanced"] for each in books)
    assert sum(each["loaded"] for each in books) == 3 * COUNT
    assert sum(each["duplicate"] for each in books) == 33 * COUNT
