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

from datapipe.sinks.parts import KEY_REUSED
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


def dead(database: str) -> dict[str, tuple[int, int]]:
    """Dead letters of reused keys, and different ones, by the mark of the body."""
    rows = Postgres.execute(
        database,
        "SELECT split_part(t, ' ', 1), count(*), count(DISTINCT t) FROM (SELECT"
        " coalesce(event ->> 'message', event ->> 'sku') AS t FROM datapipe_dead_letters"
        f" WHERE sqlstate IS NULL AND message = '{KEY_REUSED}') AS everything GROUP BY 1",
    )
    return {mark: (count, distinct) for mark, count, distinct in rows}


async def test_another_body_under_the_same_key(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    """By processes that don't know of each other one stands as a whole, whichever loads which; the
    others are dead letters as a whole, and each once. One that knows of another refuses it.
    """
    services = await two(database, make_service, tmp_path)
    answered: set[str] = set()
    for number in range(3):
        marks = [f"{number}{name}" for name in "abcdef"]
        sent = [(mark, services[n % 2]) for n, mark in enumerate(marks * 2)]
        sent += [(marks[0], services[1])]  # the rest by one of them alone
        statuses = await asyncio.gather(
            *(send(service, mark, f"k{number}") for mark, service in sent)
        )
        taken = {mark for (mark, _), status in zip(sent, statuses, strict=True) if status == 200}
        assert 1 <= len(taken) <= 2, statuses
        assert set(statuses) <= {200, 422}
        answered |= taken
    books = [await service.drained() for service in services]
    rows, letters = stored(database), dead(database)
    assert sorted(mark[0] for mark in rows) == ["0", "1", "2"], rows
    assert rows.keys() | letters.keys() == answered
    assert not rows.keys() & letters.keys()
    assert {*rows.values(), *letters.values()} == {(COUNT, COUNT)}
    assert all(each["balanced"] for each in books)
    assert sum(each["loaded"] for each in books) == 3 * COUNT
    assert sum(each["dead"] for each in books) == len(letters) * COUNT


# --- verdicts that change between two tries of the same body ---

SHORT = 100  # an `input_max_len` that every third event is longer than
WAITS = {"load_interval": 3600, "load_min_interval": 3600}


def mixed() -> list[dict[str, Any]]:
    """Over some parts; a third of them long, a third of a type that is registered late."""
    events: list[dict[str, Any]] = []
    for n in range(0, 900, 3):
        events += [
            crash(f"short {n:040}", n),
            crash(f"long {n:040}" + "x" * SHORT, n + 1),
            {"event_name": "signup", "user_id": n + 2},
        ]
    return events


def users(database: str, *more: str) -> list[int]:
    tables = ["SELECT user_id FROM crash_report", "SELECT user_id FROM signup", *more]
    rows = Postgres.execute(database, f"{' UNION ALL '.join(tables)} ORDER BY 1")
    return [user for (user,) in rows]


async def test_each_event_counts_once_whatever_was_rejected_at_which_try(
    database: str, make_service: MakeService
) -> None:
    """Killed between the tries, before or behind a load, and started with other settings."""
    signup = {"signup": {"user_id": "int"}}
    Postgres.execute(database, "CREATE TABLE signup (user_id bigint, received_at timestamptz)")
    service = make_service(database_url=database, **WAITS)
    body = json.dumps(mixed())
    # what each try is made with, and whether it is loaded before the next one
    tries: list[tuple[dict[str, Any], bool]] = [
        ({"input_max_len": SHORT, "events": {}}, True),
        ({"input_max_len": SHORT, "events": signup}, False),
        ({"input_max_len": 16384, "events": {}}, True),
        ({"input_max_len": 16384, "events": signup}, False),
    ]
    accepted = []
    for settings, loaded in tries:
        service.settings |= settings
        await service.start()
        _, answer = await service.post(body, headers={"Idempotency-Key": "k"})
        accepted.append(answer["accepted"])
        if loaded:
            await service.load()
        if len(accepted) < len(tries):
            await service.kill()
    assert accepted == [300, 600, 600, 900]
    await service.load()
    books = await service.drained()
    assert users(database) == list(range(900))
    assert (books["balanced"], books["dead"]) == (True, 0)


async def test_each_event_counts_once_by_processes_that_judge_differently(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    """At once, while they load; what is an unknown type's to one is a known one's to the other."""
    Postgres.execute(database, "CREATE TABLE signup (user_id bigint, received_at timestamptz)")
    signup = {"signup": {"user_id": "int"}}
    given: list[dict[str, Any]] = [
        {"input_max_len": SHORT, "events": signup}, {"unknown_events": "keep"},
    ]  # fmt: skip
    services = [
        make_service(
            database_url=database, load_interval=0.1, load_min_interval=0,
            load_trigger_bytes=5000, data_dir=str(tmp_path / str(n)), **more,
        )
        for n, more in enumerate(given)
    ]  # fmt: skip
    await asyncio.gather(*(service.start() for service in services))
    body = json.dumps(mixed())
    answers = await asyncio.gather(
        *(services[n % 2].post(body, headers={"Idempotency-Key": f"{n // 6}"}) for n in range(18))
    )
    assert [answer["accepted"] for _, answer in answers] == [600, 900] * 9
    books = [await service.drained() for service in services]
    unknown = "SELECT (event ->> 'user_id')::bigint FROM datapipe_unknown"
    assert users(database, unknown) == sorted([*range(900)] * 3)
    assert sum(each["loaded"] for each in books) == 2700
    assert all(each["balanced"] and not each["dead"] for each in books)


async def test_a_key_that_a_restart_forgot_makes_dead_letters_once(
    database: str, make_service: MakeService
) -> None:
    """Killed before the load of the other body, and behind it; and put back whatever the key."""
    service = make_service(database_url=database, **WAITS)
    for mark, loaded in (("a", False), ("b", True), ("b", False)):
        await service.start()
        assert await send(service, mark) == 200
        if loaded:
            await service.load()
        if mark == "a" or loaded:
            await service.kill()
    assert await send(service, "a") == 422
    await service.load()
    await service.drained()
    (stands,) = stored(database)
    (other,) = {"a", "b"} - {stands}
    assert (stored(database), dead(database)) == (
        {stands: (COUNT, COUNT)}, {other: (COUNT, COUNT)},
    )  # fmt: skip
    found = (await service.get("/dead"))[1]
    assert {(group["sqlstate"], group["message"]) for group in found["groups"]} == {
        (None, KEY_REUSED)
    }
    wanted = {"lane": "purchase", "sqlstate": None}
    async with service.session.post(f"{service.url}/dead/replay", json=wanted) as answer:
        assert await answer.json() == {"replayed": {"purchase": COUNT // 2}, "dead": 0}
    assert stored(database)[other] == (COUNT // 2, COUNT // 2)
    assert dead(database) == {other: (COUNT // 2, COUNT // 2)}
