"""Lanes that can't be loaded: others go on, memory is theirs, half of the mirror at most is taken.

And a background task that dies: the service ends with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import psycopg2

from tests.fault.driver import Driver
from tests.fault.moments import Moment, cut
from tests.fault.proxy import Proxy
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import ask, crash, post, purchase

MakeService = Callable[..., Service]
STUCK = ("one", "two", "three")
FIELDS = {"n": "int", "t": "str"}


async def send(service: Service, *events: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return await service.post([{"t": "x" * 1000, **event} for event in events])


async def lanes(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = (await service.status())["lanes"]
    return found


async def test_three_locked_tables_hold_up_nobody_else(
    postgres: Postgres, database: str, make_service: MakeService, seed: int
) -> None:
    journal = 2_000_000
    service = make_service(
        database_url=database, load_interval=0.2, load_min_interval=0, load_trigger_bytes=20_000,
        journal_max_bytes=journal, events=dict.fromkeys(STUCK, FIELDS),
        event_modules=["tests.fault.modules.quick_locks"],
    )  # fmt: skip
    await service.start()
    for lane in STUCK:
        assert (await send(service, {"event_name": lane, "n": 0}))[0] == 200
    await service.drained()
    locks = psycopg2.connect(database)
    with locks.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {', '.join(STUCK)} IN ACCESS EXCLUSIVE MODE")
    taken = dict.fromkeys(STUCK, 1)
    refused: dict[str, Any] = {}

    async def fill() -> bool:
        """Until the lanes that are stuck have their half."""
        for lane in STUCK:
            status, answer = await send(service, *({"event_name": lane, "n": 1},) * 20)
            taken[lane] += answer.get("accepted", 0)
            if status == 503:
                refused[lane] = answer
        return len(refused) == len(STUCK)

    async def one_way_or_the_other() -> bool:
        return all(
            lane["in_memory"] == 0 for name, lane in (await lanes(service)).items() if name in STUCK
        )

    driver = Driver(lambda: service.url, seed)
    async with driver.running():  # at full speed, all the time
        await until(fill, what="full lanes")
        await until(one_way_or_the_other, what="lanes that hold no memory")
        loads = len(service.logged("segments loaded"))
        await driver.answered(300)

        async def more_loads() -> bool:
            return len(service.logged("segments loaded")) > loads + 10

        await until(more_loads, what="loads of the other lanes")
        told = await lanes(service)
        held = sum(told[lane]["waiting_bytes"] for lane in STUCK)
        assert 0.4 * journal < held < 0.6 * journal, held
        # only their own events are refused, and the answer says whose
        both = [{"event_name": "one", "n": 2, "t": ""},
                {"event_name": "install", "user_id": -1, "timestamp": 1}]  # fmt: skip
        answer = await ask(service, post(json.dumps(both).encode()))
        assert (answer.status, answer.code) == (207, 1)
        assert answer.json["busy"] == ["one"]
        assert [e["status_code"] for e in answer.json["errors"]] == [9]
        assert int(answer.headers["retry-after"]) >= 1
        assert all(each["status_code"] == 9 for each in refused.values())
        # with a key nothing is taken, and the whole of it later
        keyed = post(
            json.dumps([both[0], {**both[1], "user_id": -2}]).encode(), "Idempotency-Key: k"
        )
        answer = await ask(service, keyed)
        assert (answer.status, answer.code, answer.json["busy"]) == (503, 9, ["one"])
        assert int(answer.headers["retry-after"]) >= 1
        single = await ask(service, post(json.dumps(both[0]).encode()))
        assert (single.status, single.code) == (503, 9)
        assert int(single.headers["retry-after"]) >= 1
        assert (await service.get("/readyz"))[0] == 200
    await driver.settle()
    Postgres.execute(database, "DELETE FROM install WHERE user_id = -1")

    async def others_empty() -> bool:
        found = await lanes(service)
        return not any(found[lane]["waiting"] for lane in found if lane not in STUCK)

    await until(others_empty, what="empty lanes")
    assert Postgres.execute(database, "SELECT 1 FROM install WHERE user_id = -2") == []
    Postgres.execute(database, "DELETE FROM install WHERE user_id = -1")
    await driver.check(database)
    locks.close()
    books = await service.drained(60)
    assert books["balanced"]
    assert (books["dead"], len(service.logged("rows refused"))) == (0, 0)
    for lane in STUCK:
        count = postgres.execute(database, f"SELECT count(*) FROM {lane}")
        assert count == [(taken[lane],)]
    for _ in range(2):
        assert (await ask(service, keyed)).status == 200
    books = await service.drained(60)
    assert books["balanced"]
    assert postgres.execute(database, "SELECT count(*) FROM install WHERE user_id = -2") == [(1,)]
    assert postgres.execute(database, "SELECT count(*) FROM one") == [(taken["one"] + 1,)]


async def test_what_is_parked_is_loaded_before_what_came_later(
    database: str, make_service: MakeService, proxy: Proxy
) -> None:
    """Though memory has room again for what comes later."""
    service = make_service(
        database_url=proxy.url, load_interval=0.2, load_min_interval=0, load_trigger_bytes=20_000,
        buffer_max_bytes=100_000,
    )  # fmt: skip
    await service.start()
    for event in (crash(user_id=0), purchase(user_id=0)):
        assert (await service.post(event))[0] == 200
    await service.drained()

    async def cut_all(moment: Moment) -> bool:
        return await cut()

    proxy.hook = cut_all
    for user in range(1, 7):
        assert (await service.post([purchase("x" * 1000, user)] * 20))[0] == 200
    for user in range(1, 11):
        assert (await service.post([crash("x" * 1000, user)] * 20))[0] == 200
    found = await lanes(service)
    assert found["purchase"]["parked"] > 0
    assert found["crash_report"]["parked"] > 100
    with psycopg2.connect(database) as lock, lock.cursor() as cursor:
        cursor.execute("LOCK TABLE crash_report IN ACCESS EXCLUSIVE MODE")
        proxy.let_pass()

        async def others_loaded() -> bool:
            return bool((await lanes(service))["purchase"]["waiting"] == 0)

        await until(others_loaded, what="memory with room")
        assert (await service.post([crash("x" * 1000, 11)] * 20))[0] == 200
    await service.drained()
    by_transaction = "SELECT user_id FROM crash_report ORDER BY xmin::text::bigint, user_id"
    users = [user for (user,) in Postgres.execute(database, by_transaction)]
    assert users == [0, *(user for user in range(1, 12) for _ in range(20))]


async def test_what_is_read_ahead_while_a_load_fails_is_neither_lost_nor_held(
    postgres: Postgres, database: str, make_service: MakeService
) -> None:
    """The load fails in the middle of that reading: all is parked again, and loaded later."""
    service = make_service(
        database_url=database, load_interval=0.2, load_min_interval=0,
        buffer_max_bytes=262_144, load_trigger_bytes=20_000,
        event_modules=["tests.fault.modules.quick_locks", "tests.fault.modules.slow_reads"],
        events={"one": FIELDS},
    )  # fmt: skip
    await service.start()
    assert (await send(service, {"event_name": "one", "n": 0}))[0] == 200
    await service.drained()
    locks = psycopg2.connect(database)
    locks.cursor().execute("LOCK TABLE one")

    async def failed(times: int) -> bool:
        return len(service.logged("load failed")) >= times

    assert (await send(service, *({"event_name": "one", "n": 1},) * 10))[0] == 200
    await until(lambda: failed(1), what="a lane that is put off")
    for _ in range(9):
        assert (await send(service, *({"event_name": "one", "n": 1},) * 10))[0] == 200
    before = len(service.logged("load failed"))
    await until(lambda: failed(before + 2), what="two loads that fail as more is read")
    locks.close()
    books = await service.drained()
    assert (books["loaded"], books["balanced"]) == (101, True), service.logged("load failed")
    assert postgres.execute(database, "SELECT count(*) FROM one") == [(101,)]
    assert not service.logged("segments missing in the mirror")


async def test_what_comes_during_the_last_load_of_a_turn_waits_for_the_next(
    database: str, proxy: Proxy, make_service: MakeService
) -> None:
    service = make_service(database_url=proxy.url, load_interval=300)
    await service.start()
    event = {"event_name": "install", "user_id": 1, "timestamp": 2}
    assert (await service.post(event))[0] == 200

    async def one_more_comes() -> bool:
        return (await service.post(event))[0] == 200

    async with asyncio.TaskGroup() as both:
        both.create_task(proxy.at(Moment.COPY, one_more_comes))
        load = both.create_task(service.load())
    assert load.result() == {"loaded": {"install": 1}, "failed": {}}
    lane = (await lanes(service))["install"]
    assert (lane["waiting"], lane["state"]) == (1, "waiting")
    assert lane["next_load_seconds"] > 200


async def test_a_background_task_that_dies_ends_the_service(
    database: str, make_service: MakeService, seed: int
) -> None:
    """Exit code 1, the traceback as a JSON line; what was answered is loaded all the same."""
    service = make_service(
        database_url=database, event_modules=["tests.fault.modules.dying"], load_interval=300
    )
    await service.start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        assert await service.wait(20) == 1
        service.url = ""
    assert all(raw.startswith("{") for raw in service.raw), service.raw
    (died,) = service.logged("background task died")
    assert died["level"] == "critical"
    assert "RuntimeError: this task dies on purpose" in json.dumps(died)
    assert "Traceback" in json.dumps(died)
    assert [line["waiting"] for line in service.logged("stopped")] == [0]
    service.settings |= {"event_modules": [], "load_interval": 0.2}
    await service.start()
    await driver.settle()
    await service.drained()
    await driver.check(database)


async def test_an_append_that_dies_ends_the_service_and_answers_who_waits(
    database: str, make_service: MakeService
) -> None:
    service = make_service(
        database_url=database, event_modules=["tests.fault.modules.dying_appends"]
    )
    await service.start()
    status, answer = await service.post(crash())
    assert (status, answer["status_code"]) == (500, 100)
    assert await service.wait(20) == 1
    (died,) = service.logged("background task died")
    assert "RuntimeError: this task dies on purpose" in json.dumps(died)
