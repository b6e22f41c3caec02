"""Appends to the mirror that hang, fail in part, or wait for company."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fault.ironmq_process import Queue, running_queue
from tests.fault.test_limits import BLOCK_S, pinging, some
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import crash, purchase

MakeService = Callable[..., Service]
HANGING = ["tests.fault.modules.hanging"]


@pytest.fixture
async def queue() -> AsyncIterator[Queue]:
    async with running_queue() as running:
        yield running


async def books(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = (await service.status())["books"]
    return found


def users(database: str, table: str) -> list[int]:
    return [user for (user,) in Postgres.execute(database, f"SELECT user_id FROM {table}")]


async def test_an_append_that_hangs_refuses_until_it_ends_and_is_booked_then(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    """The disk does not even say no: one POST finds out, the others are told at once."""
    service = make_service(
        database_url=database, mirror_timeout=0.5, load_interval=0.2, event_modules=HANGING
    )
    await service.start()
    (hang := tmp_path / "hang-crash_report").touch()
    began = time.monotonic()
    status, answer = await service.post(crash(user_id=1))
    assert (status, answer["status_code"]) == (503, 9)
    between = time.monotonic()
    assert (await service.post(crash(user_id=2)))[0] == 503
    first_s, second_s = between - began, time.monotonic() - between
    assert second_s < first_s * 2 / 3, (first_s, second_s)  # the first waited for 1.5 s
    hang.unlink()

    async def taken() -> bool:
        return (await service.post(crash(user_id=3)))[0] == 200

    await until(taken, what="a mirror that works again")
    told = await service.drained()
    assert (told["accepted"], told["loaded"], told["balanced"]) == (2, 2, True)
    assert sorted(users(database, "crash_report")) == [1, 3]
    assert [len(service.logged(f"mirror {way}")) for way in ("down", "up")] == [1, 1]


async def test_a_lane_whose_append_hangs_leaves_no_other_lane_in_the_air(
    database: str, make_service: MakeService, queue: Queue, tmp_path: Path
) -> None:
    """A POST over two lanes is not refused while the append of one of them is under way."""
    service = make_service(
        database_url=database, mirror_timeout=0.5, load_interval=0.2, event_modules=HANGING,
        **queue.settings,
    )  # fmt: skip
    await service.start()
    (hang := tmp_path / "hang-purchase").touch()
    assert (await service.post(purchase()))[0] == 503
    await queue.order(faults=[{"what": "late", "call": "post", "n": 1, "seconds": 0.3}])
    assert (await service.post([crash(), purchase()]))[0] == 503
    assert (await books(service))["accepted"] == 1

    await queue.order(clear=True, faults=[{"what": "503", "rate": 1.0, "call": "post"}])
    assert (await service.post([crash(), purchase()]))[0] == 503
    hang.unlink()
    await queue.order(clear=True)

    async def taken() -> bool:
        return (await service.post(purchase(user_id=7)))[0] == 200

    await until(taken, what="a mirror that works again")
    told = await service.drained()
    assert told["balanced"]
    assert 7 in users(database, "purchase")
    assert not [line for line in service.lines if "never retrieved" in json.dumps(line)]


async def test_what_a_failed_append_stored_is_booked_and_loaded(
    database: str, make_service: MakeService, queue: Queue, seed: int
) -> None:
    """A POST takes several messages; the answer to one of them never comes."""
    chance = random.Random(seed)
    events = [crash(chance.randbytes(7000).hex(), user_id=n) for n in range(40)]
    service = make_service(
        database_url=database, mirror_timeout=1.0, load_interval=0.2, input_max_len=16384,
        **queue.settings,
    )  # fmt: skip
    await service.start()
    assert (await service.post(crash(user_id=-1)))[0] == 200
    await service.drained()
    await queue.order(faults=[{"what": "late", "call": "post", "n": 1, "seconds": 30}])
    status, answer = await service.post(events)
    assert (status, answer["status_code"]) == (503, 9), answer
    stored = (await books(service))["accepted"] - 1
    assert 0 < stored < len(events)

    async def loaded() -> bool:
        return len(users(database, "crash_report")) >= 1 + stored

    await until(loaded, what="a load of what was stored")
    assert (await books(service))["balanced"]
    found = users(database, "crash_report")
    assert len(set(found)) == len(found)


async def test_mirror_linger_ms_waits_for_more_events(
    database: str, make_service: MakeService
) -> None:
    service = make_service(database_url=database, mirror_linger_ms=1500, load_interval=3600)
    await service.start()
    began = time.monotonic()
    first = asyncio.create_task(service.post(crash(user_id=1)))
    for _ in range(20):  # whatever else waits to be done is done meanwhile
        assert (await service.get("/healthz"))[0] == 200
    assert not first.done()
    assert (await service.post(crash(user_id=2)))[0] == 200
    assert (await first)[0] == 200
    assert time.monotonic() - began >= 1.4
    assert (await service.load())["loaded"] == {"crash_report": 2}

    async def told() -> bool:
        return bool(service.logged("segments loaded"))

    await until(told, what="a log line")
    (load,) = service.logged("segments loaded")
    assert (load["segments"], load["rows"]) == (1, 2)


async def test_a_batch_over_many_queues_holds_up_nobody(
    database: str, make_service: MakeService, queue: Queue
) -> None:
    """Each lane has a queue of its own in IronMQ: a request for each, but not all at once."""
    names = [f"type_{n}" for n in range(1500)]
    service = make_service(
        database_url=database, load_interval=3600, **queue.settings,
        events={name: {"user_id": "int"} for name in names},
    )  # fmt: skip
    await service.start()
    batch = [{"event_name": name, "user_id": 1} for name in names]
    assert (await service.post(batch))[0] == 200  # and the queues are there
    held: list[float] = []
    while not held or (held[-1] >= BLOCK_S and len(held) < 5):
        async with pinging(service) as took:
            await some(took, 3)
            took.clear()
            status, answer = await service.post(batch)
            assert (status, answer["accepted"]) == (200, len(names))
            await some(took, len(took) + 2)
        held.append(max(took))
    assert min(held) < BLOCK_S, held
