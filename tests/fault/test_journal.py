"""The journal on disks that are full, read-only or damaged: a clear line, and no loss."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import command
from tests.fault.driver import Driver
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import ask, crash, post

MakeService = Callable[..., Service]
NOWHERE = f"postgresql://postgres@127.0.0.1:{free_port()}/nothing"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MiB, so that 16 MiB lie above what is kept free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=80m", "tmpfs"]
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
async def driver_and_service(
    database: str, make_service: MakeService, disk: Path, seed: int
) -> AsyncIterator[tuple[Driver, Service]]:
    service = make_service(database_url=database, data_dir=str(disk), load_interval=0.1)
    await service.start()
    driver = Driver(lambda: service.url, seed)
    async with driver.running():
        await driver.answered(50)
        yield driver, service


async def is_refused(service: Service, why: str) -> None:
    """A POST is answered 503, with the reason and a time to come back; reading goes on."""

    async def refused() -> bool:
        return (await service.post(crash(user_id=-1)))[0] == 503

    await until(refused, what="an answer of 503")
    answer = await ask(service, post(b'{"event_name": "install", "user_id": -2, "timestamp": 1}'))
    assert (answer.status, answer.code) == (503, 9)
    assert int(answer.headers["retry-after"]) >= 1
    assert why in answer.json["status_message"], answer
    assert (await service.get("/readyz"))[0] == 503
    assert (await service.get("/healthz"))[0] == 200


async def is_well_again(driver: Driver, service: Service, database: str) -> None:
    """What was answered is in its table once; what was refused without a key is nowhere."""

    async def ready() -> bool:
        return (await service.get("/readyz"))[0] == 200

    await until(ready, what="ready again")
    await driver.answered(50)


@pytest.mark.needs_root
async def test_a_full_disk_refuses_before_it_is_full_and_heals(
    driver_and_service: tuple[Driver, Service], disk: Path, database: str
) -> None:
    driver, service = driver_and_service
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.truncate(30 << 20)
        os.posix_fallocate(file.fileno(), 0, 30 << 20)
    await is_refused(service, "64 MiB")
    books = await service.drained()  # loading and removal go on meanwhile
    assert books["balanced"]
    ballast.unlink()
    await is_well_again(driver, service, database)
    driver._stopping = True
    await driver.settle()
    await service.drained()
    Postgres.execute(database, "DELETE FROM crash_report WHERE user_id < 0")
    await driver.check(database)
    assert not service.logged("mirror down")  # full is not down


@pytest.mark.needs_root
async def test_a_disk_without_any_room_keeps_what_it_has(
    driver_and_service: tuple[Driver, Service], disk: Path, database: str
) -> None:
    """Even removal fails: what was loaded is not loaded again when the process is killed then."""
    driver, service = driver_and_service
    ballast = (disk / "ballast").open("wb", buffering=0)
    with ballast as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 65536)
    await is_refused(service, "")
    (disk / "ballast").unlink()
    await is_well_again(driver, service, database)
    driver._stopping = True
    await driver.settle()
    await service.kill()
    await service.start()
    await service.drained()
    Postgres.execute(database, "DELETE FROM crash_report WHERE user_id < 0")
    await driver.check(database)


async def test_a_disk_that_turns_read_only_is_down_and_heals(
    database: str, make_service: MakeService, tmp_path: Path, seed: int
) -> None:
    modules = ["tests.fault.modules.read_only"]
    service = make_service(database_url=database, load_interval=0.1, event_modules=modules)
    await service.start()
    driver = Driver(lambda: service.url, seed)
    flag = tmp_path / "var" / "journal" / "read-only"
    async with driver.running():
        await driver.answered(50)
        flag.touch()
        await is_refused(service, "readonly")
        flag.unlink()
        await is_well_again(driver, service, database)
    await driver.settle()
    books = await service.drained()
    assert books["balanced"]
    Postgres.execute(database, "DELETE FROM crash_report WHERE user_id < 0")
    await driver.check(database)
    assert len(service.logged("mirror down")) == len(service.logged("mirror up")) == 1


async def test_the_ledger_keeps_what_the_journal_could_not_remove(
    postgres: Postgres, database: str, make_service: MakeService, tmp_path: Path
) -> None:
    """Else a crash before that removal would load it again."""
    modules = ["tests.fault.modules.read_only", "tests.fault.modules.quick_watch"]
    service = make_service(database_url=database, load_interval=300, event_modules=modules)
    await service.start()
    assert (await service.post(crash(user_id=1)))[0] == 200
    flag = tmp_path / "var" / "journal" / "read-only"
    flag.touch()
    assert (await service.load())["loaded"] == {"crash_report": 1}

    async def beats() -> int:
        ((count,),) = await postgres.aexecute(
            database, "SELECT coalesce(max(beats), 0) FROM datapipe_processes"
        )
        return int(count)

    before = await beats()

    async def beaten() -> bool:
        return await beats() >= before + 3

    await until(beaten, what="three more beats, each of which tidies the ledger up")
    await service.kill()
    flag.unlink()
    await service.start()

    async def recovered() -> bool:
        return (await service.status())["books"]["duplicate"] == 1

    await until(recovered, what="the segment, known to the ledger")
    assert await postgres.aexecute(database, "SELECT count(*) FROM crash_report") == [(1,)]


@pytest.mark.needs_root
async def test_a_read_only_disk_at_the_start_is_one_clear_line(
    make_service: MakeService, disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    service = make_service(database_url=NOWHERE, data_dir=str(disk))
    service.file.write_text(json.dumps(service.settings))
    code, output = await command(service.file, "serve")
    assert code == 2
    assert "data_dir" in output
    assert "Traceback" not in output
    assert (await command(service.file, "check"))[0] == 1


async def test_a_damaged_journal_is_told_and_what_can_be_read_is_loaded(
    database: str, make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service(database_url=NOWHERE, load_interval=300, buffer_max_bytes=0)
    await service.start()
    for n in range(200):
        assert (await service.post([crash("x" * 1500, 10 * n + i) for i in range(10)]))[0] == 200
    await service.kill()
    (path,) = (tmp_path / "var" / "journal").glob("*.sqlite")
    with path.open("r+b") as file:
        file.write(b"\0" * 100)  # the header
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(40_000))  # the middle
    os.truncate(path, path.stat().st_size - 20_000)  # and the tail
    service.settings["database_url"] = database
    code, output = await command(service.file, "check")
    assert (code, "Traceback" in output) == (1, False)
    assert f"fail  journal {path.absolute()}" in output
    await service.start()
    books = await service.drained()
    ((rows, distinct),) = Postgres.execute(
        database, "SELECT count(*), count(DISTINCT user_id) FROM crash_report"
    )
    assert rows == distinct == books["loaded"]
    assert 1800 <= rows < 2000, rows
    # its log had the header yet, so the index told of all; what is gone since is owned up to
    missing = sum(line["events"] for line in service.logged("segments missing in the mirror"))
    assert (books["recovered"], books["balanced"]) == (rows + missing, missing == 0)
    (told,) = service.logged("journal damaged")
    assert Path(told["kept"]).exists()
    assert await service.stop() == 0
    assert Path(told["kept"]).exists()
    code, output = await command(service.file, "check")
    assert (code, told["kept"] in output) == (0, True)


async def test_space_is_given_back_after_a_burst(
    postgres: Postgres, make_service: MakeService, tmp_path: Path
) -> None:
    database = postgres.url("later_" + tmp_path.name[-20:].lower())
    service = make_service(
        database_url=database, load_interval=0.2,
        event_modules=["tests.fault.modules.quick_watch"],
    )  # fmt: skip
    await service.start()
    for n in range(30):
        batch = [crash("x" * 1900, 1000 * n + i) for i in range(500)]
        assert (await service.post(batch))[0] == 200
    (path,) = (tmp_path / "var" / "journal").glob("*.sqlite")
    assert path.stat().st_size > 20_000_000
    postgres.execute(postgres.url("postgres"), f"CREATE DATABASE {database.rpartition('/')[2]}")
    await service.drained()

    async def small() -> bool:
        return path.stat().st_size < 12_000_000

    await until(small, what="a small file")


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def _remove_file(path: Path) -> None:
    path.unlink()


def _remove_log(path: Path) -> None:
    Path(f"{path}-wal").unlink()


def _remove_lock(path: Path) -> None:
    path.with_suffix(".lock").unlink()


def _rename(path: Path) -> None:
    path.rename(path.with_name("kept"))


def _put_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"not a journal at all" * 1000)
    other.rename(path)


def _truncate(path: Path) -> None:
    os.truncate(path, 0)


def _truncate_log(path: Path) -> None:
    os.truncate(f"{path}-wal", 0)


TAKEN = [_remove_folder, _remove_file, _remove_log, _remove_lock, _rename, _put_another, _truncate,
         _truncate_log]  # fmt: skip


async def some_wait(service: Service, count: int) -> Path:
    """Post so many events, one by one, which nothing loads yet; the journal's path."""
    await service.start()
    for n in range(count):
        assert (await service.post(crash(user_id=n)))[0] == 200
    (path,) = (Path(service.settings["data_dir"]) / "journal").glob("*.sqlite")
    return path


async def post_on(service: Service, first: int, count: int) -> set[int]:
    """Post until so many more were answered 200, which ones; nothing but 503 comes else."""
    answered: set[int] = set()
    ids = itertools.count(first)

    async def enough() -> bool:
        id = next(ids)
        status, answer = await service.post(crash(user_id=id))
        assert status in (200, 503), answer
        if status == 200:
            answered.add(id)
        return len(answered) == count

    await until(enough, what="answers of 200")
    return answered


async def ids_in(database: str) -> list[int]:
    rows = await asyncio.to_thread(
        Postgres.execute, database, "SELECT user_id FROM crash_report ORDER BY user_id"
    )
    return [id for (id,) in rows]


@pytest.mark.parametrize("take", TAKEN)
async def test_a_journal_that_is_taken_away_is_made_anew(
    database: str, make_service: MakeService, take: Callable[[Path], None]
) -> None:
    """No 200 for what lies in a file that nobody will find again."""
    service = make_service(database_url=database, load_interval=300)
    path = await some_wait(service, 50)
    take(path)
    answered = await post_on(service, 1000, 20)
    status = await service.status()
    assert (status["ready"], status["mirror"]["up"]) == (True, True)
    await service.kill()
    service.settings["load_interval"] = 0.2
    await service.start()
    books = await service.drained()
    assert books["balanced"]
    found = await ids_in(database)
    assert len(set(found)) == len(found)
    assert answered <= set(found)
    if take not in (_truncate, _truncate_log):  # what our connections still see is put there again
        assert set(found) == answered | set(range(50))
    assert len(service.logged("journal damaged")) == 1


@pytest.mark.parametrize("take", TAKEN)
async def test_what_memory_holds_is_loaded_though_the_journal_was_taken_away(
    database: str, make_service: MakeService, take: Callable[[Path], None]
) -> None:
    service = make_service(database_url=database, load_interval=300)
    take(await some_wait(service, 50))

    async def told() -> bool:
        return bool(service.logged("journal damaged"))

    await until(told, 10, "a look, though no POST came")
    answered = await post_on(service, 1000, 10)
    assert await service.stop() == 0
    assert await ids_in(database) == [*range(50), *sorted(answered)]


async def test_a_journal_that_cannot_be_made_anew_refuses_and_heals(
    database: str, make_service: MakeService
) -> None:
    service = make_service(database_url=database, load_interval=300)
    path = await some_wait(service, 50)
    shutil.rmtree(path.parent)
    path.parent.write_text("a file where the folder was")
    await is_refused(service, "journal")
    summary = (await service.status())["summary"]
    assert (summary["state"], str(path.parent) in summary["text"]) == ("refusing", True)
    assert (await service.load()) == {"loaded": {"crash_report": 50}, "failed": {}}
    path.parent.unlink()
    answered = await post_on(service, 1000, 10)
    assert (await service.get("/readyz"))[0] == 200
    await service.kill()
    await service.start()
    assert (await service.load())["failed"] == {}
    await service.drained()
    assert await ids_in(database) == [*range(50), *sorted(answered)]
    assert await service.stop() == 0
