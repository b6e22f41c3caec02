"""Several processes on one port, one `data_dir` and one database appear as one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import Service, until

Make = Callable[..., Service]


def install(user: int) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user, "timestamp": 1}


async def accepted(service: Service) -> int:
    async with service.session.get(f"{service.url}/metrics") as response:
        found = re.search(
            r'^datapipe_events_accepted_total\{lane="install"\} (\S+)',
            await response.text(), re.MULTILINE,
        )  # fmt: skip
    assert found is not None
    return int(float(found[1]))


async def test_page_metrics_and_load_are_of_all(
    make_service: Make, database: str, postgres: Postgres
) -> None:
    settings = {"database_url": database, "load_interval": 300}
    one = await make_service(**settings).start()
    two = await make_service(**settings).start()
    for n in range(3):
        await one.post(install(n))
    await two.post([install(10), install(11)])
    for service in (one, two):
        status = await service.status()
        assert status["processes"] == 2
        assert (status["books"]["accepted"], status["books"]["balanced"]) == (5, True)
        assert status["lanes"]["install"]["waiting"] == 5
        assert await accepted(service) == 5
    assert await one.load() == {"loaded": {"install": 5}, "failed": {}}
    assert postgres.execute(database, "SELECT count(*) FROM install") == [(5,)]
    assert (await two.status())["books"]["loaded"] == 5
    second = (await two.status())["host"]
    await two.kill()
    alone = await one.status()
    assert (alone["processes"], alone["books"]["accepted"]) == (1, 3)
    assert (alone["ended"], alone["summary"]["state"]) == ([second], "process_ended")
    assert alone["summary"]["text"].startswith("One process ended at ")
    assert f": {second}. Its events are taken over within 35 s" in alone["summary"]["text"]


async def test_one_that_stops_in_order_is_not_told_of(make_service: Make, database: str) -> None:
    settings = {"database_url": database, "load_interval": 300}
    one = await make_service(**settings).start()
    two = await make_service(**settings).start()
    assert (await one.status())["processes"] == 2
    assert await two.stop() == 0
    alone = await one.status()
    assert (alone["processes"], alone["ended"]) == (1, [])
    assert alone["summary"]["state"] == "healthy"


async def test_several_on_one_port(make_service: Make, database: str) -> None:
    settings = {"database_url": database, "port": free_port(), "reuse_port": True}
    services = [await make_service(**settings).start() for _ in range(3)]
    for n in range(30):
        async with services[0].session.post(
            f"{services[0].url}/", json=install(n), headers={"Connection": "close"}
        ) as response:
            assert response.status == 200

    async def all_loaded() -> bool:
        books = (await services[0].status())["books"]
        return bool(books["loaded"] == 30 and books["balanced"])

    await until(all_loaded, what="30 loaded, over all processes")
    assert (await services[0].status())["processes"] == 3


async def test_a_deep_folder(make_service: Make, database: str, tmp_path_factory: Any) -> None:
    deep = tmp_path_factory.mktemp("d" * 90) / "var"
    one = await make_service(database_url=database, data_dir=str(deep)).start()
    await make_service(database_url=database, data_dir=str(deep)).start()
    assert (await one.status())["processes"] == 2
