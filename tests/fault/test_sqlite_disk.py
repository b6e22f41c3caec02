"""An SQLite database on a disk that is full, or that may not be written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.databases import make_refusing
from tests.fault.kills import is_refused, loads
from tests.fault.test_database import OFTEN, check_all, summary_is, under_load
from tests.service import Service

MakeService = Callable[..., Service]
# a root that may write only what its permissions let it
LESS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system, for the database alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.needs_root
async def test_a_full_disk_is_down_and_heals(
    disk: Path, make_service: MakeService, seed: int
) -> None:
    database = f"sqlite:///{disk}/events.db"
    make_refusing(database, "install", 50)
    service = make_service(database_url=database, **OFTEN)
    async with under_load(service, seed, refuses=is_refused) as driver:
        with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        await summary_is(service, "database_down")
        assert "its disk is full" in (await service.status())["database"]["error"]
        await driver.answered(50)  # events are taken all the same
        (disk / "ballast").unlink()
        await loads(service)
        await summary_is(service, "healthy", "dead_letters")
    await check_all(driver, service, database)


@pytest.mark.needs_root
async def test_a_file_that_may_not_be_written_is_down_and_heals(
    tmp_path: Path, make_service: MakeService
) -> None:
    file = tmp_path / "events.db"
    file.touch(0o444)
    service = make_service(database_url=f"sqlite:///{file}", inside=LESS, **OFTEN)
    await service.start()
    assert (await service.post({"event_name": "install", "user_id": 1, "timestamp": 2}))[0] == 200
    await summary_is(service, "database_down")
    assert "can't be written" in (await service.status())["database"]["error"]
    file.chmod(0o644)
    books = await service.drained()
    assert (books["loaded"], books["balanced"]) == (1, True)
    await summary_is(service, "healthy")
