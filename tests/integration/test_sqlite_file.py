"""The file that SQLite keeps: several who write to it, and what becomes of it while we run."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from datapipe.errors import ConfigError, LaneBlocked, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Database, Heartbeat, Table, open_sink
from datapipe.sinks.sqlite import connections, copy, sink
from datapipe.sinks.sqlite.sink import SqlitePlugin

INSTALL = Table("install", (Column("user_id", "bigint"), Column("received_at", "timestamptz")))
BEAT = Heartbeat("one", "journal1", None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def opened(path: Path, process: str = "one") -> Any:
    return open_sink(Settings(database_url=f"sqlite:///{path}"), process)


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    async with opened(path) as sink:
        yield sink


def segment(*users: int) -> Segment:
    data = "".join(f"{user}\t2026-01-02 03:04:05\n" for user in users).encode()
    return Segment("install", INSTALL.columns, data, len(users), neutral=True)


def execute(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


def users(path: Path) -> list[int]:
    return [user for (user,) in execute(path, "SELECT user_id FROM install ORDER BY 1")]


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Somebody else has begun to write, and goes on until the end of this."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


async def waiting(database: Database) -> None:
    async with asyncio.timeout(10):
        while (await database.waits()).keys() != {"install"}:
            await asyncio.sleep(0.01)


# --- several who write ---


async def test_a_load_waits_for_somebody_elses_transaction(path: Path, database: Database) -> None:
    await database.prepare(INSTALL)
    with held(path):
        loading = asyncio.create_task(database.load(INSTALL, [segment(1)]))
        await waiting(database)
        assert await database.loaded(["x"]) == set()  # whoever reads does not wait
    assert (await loading).loaded == 1
    assert await database.waits() == {}


async def test_a_file_that_stays_locked_is_down_until_it_is_not(
    path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LOCK_WAIT_S", 0.05)
    await database.prepare(INSTALL)
    with held(path):
        with pytest.raises(SinkUnavailable, match="another program has locked it") as error:
            await database.load(INSTALL, [segment(1)])
        assert error.value.everywhere
        assert str(path) in str(database.state().error)
        with pytest.raises(SinkUnavailable):
            await database.heartbeat(BEAT)
        assert ("away", f"database: SQLite refuses us: {error.value}") in await database.check(
            [INSTALL]
        )
    await database.load(INSTALL, [segment(2)])
    assert (database.state().up, users(path)) == (True, [2])


async def test_a_load_that_waits_is_ended_by_abort(path: Path, database: Database) -> None:
    await database.prepare(INSTALL)
    with held(path):
        loading = asyncio.create_task(database.load(INSTALL, [segment(1)]))
        await waiting(database)
        database.abort()
        async with asyncio.timeout(1):
            with pytest.raises(SinkUnavailable, match="shutting down"):
                await loading


@pytest.mark.parametrize("within", ["a statement", "between two"])
async def test_a_load_that_works_is_ended_by_abort(
    path: Path, database: Database, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if within == "between two":  # where `interrupt` does nothing
        monkeypatch.setattr(connections.File, "shut", lambda *_: None)
        monkeypatch.setattr(copy, "_pieces", itertools.repeat)
    await database.prepare(INSTALL)
    large = segment(*range(500_000 if within == "a statement" else 5000))
    loading = asyncio.create_task(database.load(INSTALL, [large]))
    with (
        closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        while True:  # until it has begun
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
            await asyncio.sleep(0.001)
    database.abort()
    async with asyncio.timeout(10):
        with pytest.raises(SinkUnavailable):
            await loading
    assert users(path) == []


async def test_small_work_of_one_process_passes_the_loads_of_another(
    path: Path, database: Database
) -> None:
    await database.prepare(INSTALL)
    loads = 0

    async def load_on_and_on() -> None:
        nonlocal loads
        while True:
            await database.load(INSTALL, [segment(*range(20_000))])
            loads += 1

    loading = [asyncio.create_task(load_on_and_on()) for _ in range(3)]  # workers
    async with opened(path, "two") as two:
        await two.heartbeat(Heartbeat("two", "two", None))
        while not loads:
            await asyncio.sleep(0.001)
        before = loads
        for _ in range(10):
            await two.heartbeat(Heartbeat("two", "two", None))
        passed = loads - before
    for each in loading:
        each.cancel()
    await asyncio.wait(loading)
    assert passed < 50  # most often about 10: one load before each


async def test_others_may_write_before_the_next_transaction_of_a_process(
    path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_GAP_S", 0.5)
    async with opened(path, "two") as two:
        await two.prepare(INSTALL)
        await database.load(INSTALL, [segment(1)])
        loading = asyncio.create_task(database.load(INSTALL, [segment(2)]))
        await two.expire([])
        assert not loading.done()
        await loading


# --- what becomes of the file ---


async def test_each_commit_is_flushed_and_who_reads_waits_for_nobody(
    path: Path, database: Database
) -> None:
    await database.load(INSTALL, [segment(1)])
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    said = await database._read(  # type: ignore[attr-defined]
        lambda c: [
            c.execute(f"PRAGMA {name}").fetchone() for name in ("synchronous", "foreign_keys")
        ]
    )
    assert said == [(3,), (1,)]  # EXTRA: see there
    mine = "SELECT count(*), min(strict) FROM pragma_table_list WHERE name NOT LIKE 'sqlite%'"
    assert execute(path, mine) == [(4, 1)]


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved with its folder"])
async def test_a_file_that_is_not_ours_any_more_is_written_to_no_longer(
    path: Path, database: Database, how: str
) -> None:
    await database.load(INSTALL, [segment(1)])
    await database.heartbeat(BEAT)
    if how == "deleted":
        path.unlink()
    elif how == "replaced":
        with closing(sqlite3.connect(path.with_name("new"), isolation_level=None)) as new:
            new.execute("CREATE TABLE install (user_id INTEGER, received_at TEXT, other TEXT)")
        path.with_name("new").replace(path)
        path.with_name("events.db-wal").unlink()  # else SQLite reads it as a part of the new file
        path.with_name("events.db-shm").unlink()
    else:
        path.parent.rename(path.parent.with_name("old"))
        with pytest.raises(SinkUnavailable, match="its folder is missing"):
            await database.load(INSTALL, [segment(2)])
        assert database.state().up is False
        path.parent.mkdir()
    assert (await database.heartbeat(BEAT)).keys() == {"one"}
    await database.load(INSTALL, [segment(2)])
    assert users(path) == [2]
    assert execute(path, "PRAGMA integrity_check") == [("ok",)]


async def test_a_file_system_without_wal_holds_loads_as_well(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def without(path: Path, **more: Any) -> sqlite3.Connection:
        return connect(f"file:{path}?vfs=unix-dotfile", uri=True, **more)

    monkeypatch.setattr(sqlite3, "connect", without)
    async with opened(path) as one, opened(path, "two") as two:
        await asyncio.gather(
            *(each.load(INSTALL, [segment(n)]) for n, each in enumerate((one, two)))
        )
        said = await one.check([INSTALL])
    assert any("journal mode delete, WAL from" in text for _, text in said)
    monkeypatch.undo()
    assert users(path) == [0, 1]


async def test_what_a_table_of_somebody_else_lacks_is_left_alone(
    path: Path, database: Database
) -> None:
    execute(path, "CREATE TABLE install (version TEXT)")
    with pytest.raises(LaneBlocked, match="no column received_at"):
        await database.load(INSTALL, [segment(1)])
    assert execute(path, "SELECT name FROM pragma_table_info('install')") == [("version",)]


# --- where it is, and what `check` says ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none/events.db", "the folder {path.parent} does not exist; make it"),
        ("folder", "{path} is a folder; name a file in it"),
    ],
)
async def test_a_place_where_no_file_can_be_is_one_clear_line(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        async with opened(tmp_path / name):
            pass
    assert str(error.value) == f"database_url: {said.format(path=tmp_path / name)}"


async def test_a_sqlite_that_is_too_old_is_one_clear_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigError, match=r"3\.37 is the oldest"):
        async with opened(path):
            pass


async def test_the_check_makes_no_file_and_changes_none(path: Path, database: Database) -> None:
    first, *_ = said = await database.check([INSTALL])
    assert first == ("ok", f"database: SQLite {sqlite3.sqlite_version}")
    assert ("ok", f"database: {path}: will be created when needed") in said
    assert ("ok", "table install: will be created when needed") in said
    assert await database.find_mark("datapipe") is None
    assert not path.exists()
    execute(path, "CREATE TABLE install (timestamp, received_at)")
    before = path.read_bytes()
    said = await database.check([INSTALL])
    assert ("ok", "table install: will add the column user_id when needed") in said
    assert any("journal mode delete, WAL from the first load on" in text for _, text in said)
    assert path.read_bytes() == before
    await database.prepare(INSTALL)
    assert ("ok", f"database: {path}: journal mode wal") in await database.check([INSTALL])


async def test_the_check_says_that_it_is_no_database(path: Path, database: Database) -> None:
    path.write_bytes(b"hello, world! " * 100)
    ((level, text),) = await database.check([INSTALL])
    assert level == "fail"
    assert text.startswith(f"database: SQLite refuses us: {path}: it is not an SQLite database")
    with pytest.raises(SinkUnavailable, match="it is not an SQLite database"):
        await database.load(INSTALL, [segment(1)])
    assert path.read_bytes() == b"hello, world! " * 100


async def test_the_check_warns_of_a_network_file_system(
    path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    device = os.stat(path.parent).st_dev
    number = f" {os.major(device)}:{os.minor(device)} "
    (kind, *_) = {
        line.partition(" - ")[2].split(" ")[0] for line in mounts.splitlines() if number in line
    }
    assert {level for level, _ in await database.check([])} == {"ok"}
    monkeypatch.setattr(sink, "_NETWORK", (kind,))
    assert ("warn", kind) in [
        (level, text.split(" is on ")[1].split(",")[0])
        for level, text in await database.check([])
        if level == "warn"
    ]


async def test_the_hint_is_a_line_for_the_shell(tmp_path: Path) -> None:
    path = tmp_path / "my events.db"
    async with opened(path) as database:
        hint = await database.hint("install")
    assert hint == f"sqlite3 '{path}' 'SELECT * FROM install'"


async def test_the_ddl_is_what_is_made(path: Path, database: Database) -> None:
    await database.load(INSTALL, [segment(1)])
    other = path.with_name("other.db")
    with closing(sqlite3.connect(other)) as connection:
        connection.executescript(database.ddl([INSTALL]))
    of_both = [
        execute(each, "SELECT name, sql FROM sqlite_schema ORDER BY name") for each in (path, other)
    ]
    assert of_both[0] == of_both[1]


async def test_it_is_one_file_once_all_have_closed_it(path: Path) -> None:
    async with opened(path) as one, opened(path, "two") as two:
        await one.load(INSTALL, [segment(1)])
        await two.load(INSTALL, [segment(2)])
    assert sorted(each.name for each in path.parent.iterdir()) == ["events.db"]
    shutil.copy(path, path.with_name("copy"))
    assert users(path.with_name("copy")) == [1, 2]


def test_a_relative_path_is_made_absolute_by_the_settings() -> None:
    settings = Settings(database_url="sqlite:///events.db")
    assert SqlitePlugin().settled(settings, Path("/var")).database_url == "sqlite:////var/events.db"
