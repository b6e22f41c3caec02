"""Several processes with one port, one data_dir and one database; journals whose owner is gone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import command
from tests.fault.driver import Driver, fill
from tests.fault.moments import Moment
from tests.fault.proxy import Proxy
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import crash

MakeService = Callable[..., Service]
OFTEN = {"load_interval": 0.1, "load_min_interval": 0, "load_trigger_bytes": 20_000}
ADOPTS = {"event_modules": ["tests.fault.modules.quick_recovery"]}


def ends_with_nothing(told: tuple[int, str]) -> bool:
    """Whether it loaded nothing, and nothing waits; before that stands where it looked."""
    lines = [line for line in told[1].splitlines() if not line.startswith("datapipe: ")]
    return (told[0], lines) == (0, ["waiting: 0"])


def journals(service: Service) -> list[Path]:
    return sorted((Path(service.settings["data_dir"]) / "journal").glob("*.sqlite"))


async def all_loaded_something(services: list[Service]) -> None:
    async def there() -> bool:
        return all(service.logged("segments loaded") for service in services)

    await until(there, what="a load by each process")


async def test_one_of_two_on_a_port_is_killed_and_the_other_adopts_its_journal(
    database: str, proxy: Proxy, make_service: MakeService, seed: int
) -> None:
    shared = {"port": free_port(), "reuse_port": True, **OFTEN}
    victim = make_service(database_url=proxy.url, **shared)
    heir = make_service(database_url=database, **shared, **ADOPTS)
    await asyncio.gather(victim.start(), heir.start())
    url = f"http://127.0.0.1:{shared['port']}"
    driver = Driver(lambda: url, seed, connections=32)

    async def kill() -> bool:
        os.kill(victim.pid, signal.SIGKILL)
        return False

    async def adopted() -> bool:
        return bool(heir.logged("recovered"))

    async with driver.running():
        await all_loaded_something([victim, heir])
        await proxy.at(Moment.COPY, kill)
        assert await victim.wait() == -signal.SIGKILL
        await until(adopted, what="adoption of the journal")
        await driver.answered(20)
    await driver.settle()
    books = await heir.drained()
    assert books["recovered"] > 0
    assert books["balanced"], books
    await driver.check(database)


async def test_ten_processes_start_at_once_on_one_folder_and_one_new_database(
    database: str, make_service: MakeService, seed: int
) -> None:
    services = [make_service(database_url=database, load_workers=1, **OFTEN) for _ in range(10)]
    await asyncio.gather(*(service.start() for service in services))
    chance = random.Random(seed)
    driver = Driver(lambda: chance.choice(services).url, seed)
    async with driver.running():  # a key may come to one process, and again to another
        await all_loaded_something(services)
    await driver.settle()
    books = await services[0].drained()  # each tells of all ten
    verdict = await driver.check(database)
    assert books["balanced"], books
    assert books["loaded"] == verdict.rows
    assert books["duplicate"] == verdict.duplicates_by_key
    assert len(journals(services[0])) == 10


async def test_the_load_command_loads_an_orphaned_journal(
    database: str, make_service: MakeService, seed: int
) -> None:
    service = make_service(database_url=database, load_interval=300)
    driver = await fill(service, seed, 50)
    waiting = (await service.status())["books"]["waiting"]
    assert waiting > 0
    await service.kill()
    code, output = await command(service.file, "load")
    assert code == 0, output
    assert "waiting: 0" in output
    await driver.check(database)
    assert ends_with_nothing(await command(service.file, "load"))


async def test_the_load_command_leaves_alone_what_a_living_process_owns(
    database: str, make_service: MakeService, seed: int
) -> None:
    service = make_service(database_url=database, load_interval=300)
    driver = await fill(service, seed, 20)
    code, output = await command(service.file, "load")
    assert ends_with_nothing((code, output))
    assert f"a service is running here (pid {service.pid}, {service.url})" in output
    books = (await service.status())["books"]
    assert books["waiting"] == books["accepted"]
    assert (await driver.compare(database, waiting=books["waiting"])).rows == 0
    assert await service.stop() == 0
    await driver.check(database)


async def test_the_load_command_fails_while_the_database_is_away(
    make_service: MakeService, seed: int
) -> None:
    nowhere = f"postgresql://postgres@127.0.0.1:{free_port()}/nothing"
    service = make_service(database_url=nowhere, load_interval=300)
    await fill(service, seed, 20)
    waiting = (await service.status())["books"]["waiting"]
    await service.kill()
    code, output = await command(service.file, "load")
    assert code == 1
    assert output.rstrip().endswith(f"waiting: {waiting}")
    assert "Traceback" not in output


@pytest.mark.needs_root
async def test_what_another_user_left_in_the_folder_is_passed_over(
    database: str, make_service: MakeService, seed: int
) -> None:
    """As by `datapipe load` of root, beside a service of a user without rights.

    Here the user without rights is a root that may enter only what is its own.
    """
    less = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    one, two = (make_service(inside=less, database_url=database, **ADOPTS) for _ in range(2))
    driver = await fill(one, seed)
    assert ends_with_nothing(await command(one.file, "load"))
    folder = journals(one)[0].parent
    for left in (folder / "1.lock", folder / "2.sqlite", folder / "2.lock", folder / "3.sqlite"):
        left.touch()
        left.chmod(0o644)
        os.chown(left, 65534, 65534)
    await two.start()
    assert [path.name for path in journals(two)] == ["0.sqlite", "2.sqlite", "3.sqlite", "4.sqlite"]
    assert (await two.post(crash(user_id=-1)))[0] == 200
    await two.kill()

    async def adopted() -> bool:
        return bool(one.logged("recovered"))

    await until(adopted, what="adoption of the journal behind them")
    await one.drained()
    told = {Path(line["path"]).name for line in one.logged("journal not adopted")}
    assert told == {"2.sqlite", "3.sqlite"}
    assert not one.logged("recovery failed")
    Postgres.execute(database, "DELETE FROM crash_report WHERE user_id = -1")
    await driver.check(database)
