"""The page of services that share nothing but a NATS server and a database."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.jetstream import NatsCluster
from tests.service import Service, until

INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 1}


@pytest.fixture
def machine(
    tmp_path: Path,
    make_service: Callable[..., Service],
    database: str,
    nats_node: NatsCluster,
    nats_prefix: str,
) -> Callable[[str], Service]:
    """Makes services by their names, each with a folder of its own."""

    def make(name: str) -> Service:
        return make_service(
            database_url=database, data_dir=str(tmp_path / name), load_interval=300,
            nats_prefix=nats_prefix, nats_lane_max_bytes=1 << 24, **nats_node.settings,
        )  # fmt: skip

    return make


def taken_is_accounted_for(status: dict[str, Any]) -> None:
    for books in (status["books"], *status["lanes"].values()):
        gone = sum(books[key] for key in ("loaded", "duplicate", "dead", "returned", "in_hand"))
        assert books["taken"] == gone, books
        assert books["balanced"], books


async def test_books_over_machines(machine: Callable[[str], Service]) -> None:
    one, two = await machine("one").start(), await machine("two").start()

    async def both_show(waiting: int) -> bool:
        shown = [await each.status() for each in (one, two)]
        return all((s["processes"], s["books"]["waiting"]) == (2, waiting) for s in shown)

    # by then each has looked at what waits, which is loaded at once if a start finds it
    await until(partial(both_show, 0), what="both are seen")
    await one.post([INSTALL] * 3)
    await two.post([INSTALL] * 4)
    await until(partial(both_show, 7), what="what waits is not added")
    for service in (one, two):
        status = await service.status()
        assert (status["books"]["accepted"], status["lanes"]["install"]["waiting"]) == (7, 7)
        assert status["mirror"].items() >= {"kind": "nats", "shared": True, "up": True}.items()
        assert status["silent"] == []
        taken_is_accounted_for(status)
        async with service.session.get(f"{service.url}/metrics") as response:
            metrics = await response.text()
        numbers = dict(re.findall(r'^(datapipe_\w+){lane="install"} (\S+)$', metrics, re.MULTILINE))
        assert numbers["datapipe_events_accepted_total"] == ("3.0" if service is one else "4.0")
        assert numbers["datapipe_waiting_events"] == "7.0"
        assert numbers["datapipe_books_balanced"] == "1.0"
    answer = await two.load()
    assert (answer["loaded"], answer["failed"]) == ({"install": 7}, {})

    async def all_gone() -> bool:
        books = (await one.status())["books"]
        return (books["loaded"], books["waiting"], books["taken"]) == (7, 0, 7)

    await until(all_gone, what="seven were taken and loaded, whoever did it")
    taken_is_accounted_for(await one.status())


async def test_a_process_that_is_killed_is_silent_until_it_is_dead(
    machine: Callable[[str], Service],
) -> None:
    one, two = await machine("one").start(), await machine("two").start()

    async def told() -> bool:
        status = await one.status()
        return bool(status["silent"]) and status["summary"]["state"] == "process_silent"

    for each in (one, two):  # and have looked at what waits, before there is something
        await until(partial(processes, each, 2), what="both are seen")
    await two.post([INSTALL] * 4)
    number = two.pid
    await two.kill()
    await until(told, what="one is silent")
    status = await one.status()
    assert status["silent"][0].endswith(f":{number}")
    assert status["lanes"]["install"]["waiting"] == 4, "the cluster's own count"
    assert status["books"]["accepted"] == 0
    await until(lambda: processes(one, 1), 60.0, what="it is dead")


async def processes(service: Service, wanted: int) -> bool:
    status = await service.status()
    return len(status["silent"]) == 0 and status["processes"] == wanted
