"""What every sink must do; each implementation is a parameter of the one suite."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import psycopg2
import pytest

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.events.rows import escape, neutral_time
from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column, Event, EventType
from datapipe.events.unknown import UNKNOWN, UnknownType
from datapipe.settings import Settings
from datapipe.sinks import Beat, Database, Heartbeat, Loaded, Selection, Shelf, Table, open_sink
from datapipe.sinks.letters import event_json
from datapipe.sinks.memory import MemoryDatabase
from datapipe.sinks.parts import KEY_REUSED
from datapipe.sinks.sql import SqlSink
from datapipe.sinks.sql_tables import Result, Statement
from tests.databases import execute
from tests.mariadb import MariaDB
from tests.postgres import Postgres

USER, RECEIVED = Column("user_id", "bigint"), Column("received_at", "timestamptz")
INSTALL = Table("install", (USER, RECEIVED))
PURCHASE = Table("purchase", (USER, RECEIVED))
TABLES = {table.name: table for table in (INSTALL, PURCHASE)}
SHARED = "nats:datapipe"  # the source of what a shared mirror held
AT = "2026-01-02 03:04:05+00:00"


class Place(Protocol):
    """One kind of database, looked at from beside."""

    def open(self, process: str) -> AbstractAsyncContextManager[Database]: ...

    def users(self, lane: str) -> list[int]:
        """What is in the table of a lane, in order."""

    def refuse_odd(self) -> None:
        """From now on the table `install` refuses odd users below 1,000."""

    def accept_all(self) -> None:
        """From now on it takes them again."""

    def execute(self, sql: str) -> None:
        """Run a statement from beside."""


class InPostgres:
    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, process: str) -> AbstractAsyncContextManager[Database]:
        return open_sink(Settings(database_url=self._url), process)

    def users(self, lane: str) -> list[int]:
        rows = Postgres.execute(self._url, f"SELECT user_id FROM {lane} ORDER BY 1")
        return [user for (user,) in rows]

    def refuse_odd(self) -> None:
        check = "CHECK (user_id % 2 = 0 OR user_id >= 1000)"
        Postgres.execute(self._url, f"ALTER TABLE install ADD CONSTRAINT even {check}")

    def accept_all(self) -> None:
        Postgres.execute(self._url, "ALTER TABLE install DROP CONSTRAINT even")

    def execute(self, sql: str) -> None:
        Postgres.execute(self._url, sql)


class InMariaDB:
    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, process: str) -> AbstractAsyncContextManager[Database]:
        return open_sink(Settings(database_url=self._url), process)

    def users(self, lane: str) -> list[int]:
        rows = MariaDB.execute(self._url, f"SELECT user_id FROM {lane} ORDER BY 1")
        return [user for (user,) in rows]

    def refuse_odd(self) -> None:
        check = "CHECK (user_id % 2 = 0 OR user_id >= 1000)"
        MariaDB.execute(self._url, f"ALTER TABLE install ADD CONSTRAINT even {check}")

    def accept_all(self) -> None:
        MariaDB.execute(self._url, "ALTER TABLE install DROP CONSTRAINT even")

    def execute(self, sql: str) -> None:
        MariaDB.execute(self._url, sql)


class InMemory:
    def __init__(self) -> None:
        self._database = MemoryDatabase()

    def open(self, process: str) -> AbstractAsyncContextManager[Database]:
        return self._database.open(Settings(), process)

    def users(self, lane: str) -> list[int]:
        return sorted(int(line.split(b"\t")[0]) for line in self._database.lines[lane])

    def refuse_odd(self) -> None:
        def check(line: bytes) -> bool:
            user = int(line.split(b"\t")[0])
            return user % 2 == 0 or user >= 1000

        self._database.checks["install"] = check

    def accept_all(self) -> None:
        del self._database.checks["install"]

    def execute(self, sql: str) -> None:
        raise NotImplementedError


class InSqlite:
    def __init__(self, url: str, path: Path) -> None:
        self._url = url
        self._path = path

    def open(self, process: str) -> AbstractAsyncContextManager[Database]:
        return open_sink(Settings(database_url=self._url), process)

    def execute(self, sql: str) -> None:
        self._execute(sql)

    def _execute(self, sql: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self._path, isolation_level=None)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def users(self, lane: str) -> list[int]:
        return [user for (user,) in self._execute(f"SELECT user_id FROM {lane} ORDER BY 1")]

    def refuse_odd(self) -> None:
        when = "WHEN NEW.user_id % 2 AND NEW.user_id < 1000 BEGIN SELECT RAISE(ABORT, 'odd'); END"
        self._execute(f"CREATE TRIGGER even BEFORE INSERT ON install {when}")

    def accept_all(self) -> None:
        self._execute("DROP TRIGGER even")


class World:
    """One database, which several processes open."""

    def __init__(self, place: Place, stack: AsyncExitStack) -> None:
        self.place = place
        self._stack = stack

    async def open(self, process: str = "one") -> Database:
        return await self._stack.enter_async_context(self.place.open(process))

    def users(self, lane: str = "install") -> list[int]:
        return self.place.users(lane)


# `toy` is a third party's, in a package of its own
@pytest.fixture(
    params=["postgres", "postgres13", "postgres18", "mariadb", "memory", "sqlite", "toy"]
)
async def world(request: pytest.FixtureRequest, tmp_path: Path, toys: Path) -> AsyncIterator[World]:
    def in_version() -> Place:
        """One database, emptied: a server of 18 takes 0.2 s to make one."""
        server: Postgres = request.getfixturevalue(request.param)
        url = server.url("postgres")
        server.execute(url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        return InPostgres(url)

    places: dict[str, Callable[[], Place]] = {
        "postgres": lambda: InPostgres(request.getfixturevalue("database")),
        "postgres13": in_version,
        "postgres18": in_version,
        "mariadb": lambda: InMariaDB(request.getfixturevalue("mysql_database")),
        "memory": InMemory,
        "sqlite": lambda: InSqlite(f"sqlite:///{tmp_path}/events.db", tmp_path / "events.db"),
        "toy": lambda: InSqlite(f"toy://{tmp_path}/toy.db", tmp_path / "toy.db"),
    }
    async with AsyncExitStack() as stack:
        yield World(places[request.param](), stack)


def row(user: int) -> bytes:
    return f"{user}\t{AT}\n".encode()


def segment(*users: int, lane: str = "install", key: str = "", source: str = "") -> Segment:
    """A segment; with a key it is one part of a POST of that key, whose body is its rows."""
    data = b"".join(map(row, users))
    parts = (Part(key, str(users)[:99], 0, 0, len(data), len(users)),) if key else ()
    return Segment(lane, TABLES[lane].columns, data, len(users), parts, source=source)


def counts(loaded: Loaded) -> tuple[int, int, int]:
    return loaded.loaded, loaded.duplicate, loaded.dead


async def load(sink: Database, *segments: Segment, **more: Any) -> tuple[int, int, int]:
    """Loaded, duplicate, dead."""
    return counts(await sink.load(TABLES[segments[0].lane], segments, **more))


# --- exactly once ---


async def test_what_was_loaded_is_there_and_known(world: World) -> None:
    sink = await world.open()
    one, two = segment(1, 2), segment(3)
    assert await load(sink, one, two) == (3, 0, 0)
    assert world.users() == [1, 2, 3]
    assert await sink.loaded([one.id, "x", two.id]) == {one.id, two.id}


async def test_a_segment_counts_once_in_one_load_and_in_two(world: World) -> None:
    sink = await world.open()
    one, two = segment(1, 2), segment(3)
    assert await load(sink, one, one) == (2, 2, 0)
    assert await load(sink, one, two) == (1, 2, 0)
    assert world.users() == [1, 2, 3]


async def test_a_segment_counts_once_for_two_processes_at_once(world: World) -> None:
    sinks = [await world.open(process) for process in ("one", "two")]
    await sinks[0].prepare(INSTALL)
    segments = [segment(n) for n in range(20)]
    for at in range(0, 20, 2):
        both = segments[at : at + 2]
        done = await asyncio.gather(load(sinks[0], *both), load(sinks[1], *reversed(both)))
        assert sorted(done) == [(0, 2, 0), (2, 0, 0)]
    assert world.users() == list(range(20))


async def test_lanes_have_tables_of_their_own(world: World) -> None:
    sink = await world.open()
    done = await asyncio.gather(load(sink, segment(1)), load(sink, segment(2, lane="purchase")))
    assert done == [(1, 0, 0), (1, 0, 0)]
    assert (world.users(), world.users("purchase")) == ([1], [2])


async def test_what_is_many_is_loaded_whole(world: World) -> None:
    sink = await world.open()
    segments = [segment(*range(at, at + 10)) for at in range(0, 3000, 10)]
    assert await load(sink, *segments) == (3000, 0, 0)
    assert world.users() == list(range(3000))


# --- idempotency keys ---


async def test_a_key_counts_once(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    assert await load(one, segment(1, 2, key="k"), segment(1, 2, key="k")) == (2, 2, 0)
    assert await load(two, segment(1, 2, key="k"), segment(3, key="l")) == (1, 2, 0)
    assert world.users() == [1, 2, 3]


async def test_a_key_holds_for_each_lane_and_each_part(world: World) -> None:
    """A POST of 2 parts in `install` and one in `purchase`, of which one was stored twice."""
    sink = await world.open()
    data = b"".join(map(row, (1, 2, 3)))
    size = len(row(1))
    parts = (Part("k", "body", 0, 0, size, 1), Part("k", "body", 1, size, 3 * size, 2))
    first = Segment("install", INSTALL.columns, data[:size], 1, parts[:1])
    again = Segment("install", INSTALL.columns, data + row(4), 4, parts)  # 4 has no key
    other = Segment("purchase", PURCHASE.columns, row(5), 1, parts[:1])
    assert await load(sink, first) == (1, 0, 0)
    assert await load(sink, again) == (3, 1, 0)
    assert await load(sink, other) == (1, 0, 0)
    assert (world.users(), world.users("purchase")) == ([1, 2, 3, 4], [5])


def copy(*users: int, body: str = "body", lacks: int = 0, **more: Any) -> Segment:
    """A POST of the key `k`, as one try had it: some of its events were rejected then."""
    data = b"".join(map(row, users))
    part = Part("k", body, 0, 0, len(data), len(users), lacks=f"{lacks:x}" if lacks else "", **more)
    return Segment("install", INSTALL.columns, data, len(users), (part,))


async def test_each_event_counts_once_whatever_was_rejected_at_which_try(world: World) -> None:
    """Users 0 to 5; bit n says that this try rejected user n."""
    one, two = await world.open("one"), await world.open("two")
    assert await load(one, copy(0, 2, 4, lacks=0b101010)) == (3, 0, 0)
    assert await load(two, copy(1, 2, lacks=0b111001)) == (1, 1, 0)
    assert world.users() == [0, 1, 2, 4]
    assert await load(two, copy(0, 1, 2, lacks=0b111000)) == (0, 3, 0)
    assert await load(one, copy(0, 1, 2, 3, 4, 5), segment(7)) == (3, 4, 0)
    assert await load(two, copy(0, 1, 2, 3, 4, 5)) == (0, 6, 0)
    assert await load(one, copy(3, lacks=0b110111)) == (0, 1, 0)
    assert world.users() == [0, 1, 2, 3, 4, 5, 7]


async def test_the_same_in_one_load(world: World) -> None:
    sink = await world.open()
    tries = [copy(0, 2, lacks=0b1010), copy(1, 2, 3, lacks=0b0001), copy(0, 1, 2, 3)]
    assert await load(sink, segment(8), *tries, segment(9)) == (6, 5, 0)
    assert world.users() == [0, 1, 2, 3, 8, 9]


async def test_the_same_by_two_processes_at_once(world: World) -> None:
    sinks = [await world.open(process) for process in ("one", "two")]
    await load(sinks[0], copy(*range(0, 64, 4), lacks=0xEEEEEEEEEEEEEEEE))
    async with asyncio.timeout(20):
        done = await asyncio.gather(
            *(
                load(sinks[n % 2], copy(*range(64)), copy(*range(60), lacks=0xF << 60))
                for n in range(4)
            )
        )
    assert sum(loaded for loaded, _, _ in done) == 48
    assert world.users() == list(range(64))


async def test_a_part_is_of_an_event_name_whatever_its_lane(world: World) -> None:
    """Of a type that was not registered at the first try."""
    sink = await world.open()
    data = row(1) + row(2)
    part = Part("k", "body", 0, 0, len(row(1)), 1, name="purchase")
    kept = Segment("install", INSTALL.columns, data, 2, (part,))
    assert await load(sink, kept) == (2, 0, 0)
    again = Segment("purchase", PURCHASE.columns, row(1), 1, (part,))
    assert await load(sink, again) == (0, 1, 0)


async def test_another_body_of_a_key_is_dead_letters_once(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    assert await load(one, segment(1, key="k")) == (1, 0, 0)
    size = len(row(2))
    parts = tuple(Part("k", "another", n, n * size, (n + 1) * size, 1) for n in range(2))
    other = Segment("install", INSTALL.columns, row(2) + row(3), 2, parts)  # more parts, too
    result = await two.load(INSTALL, [other, segment(4)])
    assert (counts(result), result.refused) == ((1, 0, 2), (KEY_REUSED, KEY_REUSED))
    assert world.users() == [1, 4]
    again = Segment("install", INSTALL.columns, row(2) + row(3), 2, parts)
    assert await load(one, again, other) == (0, 4, 0)
    third = segment(5, key="k")
    assert await load(one, third, segment(1, key="k"), segment(5, key="k")) == (0, 2, 1)
    found = await one.find(Selection(), 10)
    assert found["groups"] == [
        {"lane": "install", "sqlstate": None, "message": KEY_REUSED, "count": 3}
    ]
    assert {letter["sqlstate"] for letter in found["letters"]} == {None}
    assert await dead_users(one) == [5, 3, 2]
    assert await load(one, third) == (0, 1, 0)  # it was loaded, as a dead letter


async def test_of_two_bodies_in_one_load_the_first_one_stands(world: World) -> None:
    sink = await world.open()
    assert await load(sink, segment(1, key="k"), segment(2, 3, key="k")) == (1, 0, 2)
    assert (world.users(), await dead_users(sink)) == ([1], [3, 2])


async def test_of_another_body_too_each_event_counts_once(world: World) -> None:
    sink = await world.open()
    await load(sink, segment(9, key="k"))
    assert await load(sink, copy(0, 2, lacks=0b010)) == (0, 0, 2)
    assert await load(sink, copy(0, 1, lacks=0b100)) == (0, 1, 1)
    assert (world.users(), sorted(await dead_users(sink))) == ([9], [0, 1, 2])


async def test_reused_keys_do_not_block_a_lane_and_are_put_back_whatever_the_key(
    world: World,
) -> None:
    sink = await refusing(world)
    await load(sink, segment(0, key="k"))
    assert await load(sink, segment(*range(2, 302), key="k"), segment(1)) == (0, 0, 301)
    states = {group["sqlstate"] for group in (await sink.find(Selection(), 0))["groups"]}
    assert len(states) == 2  # of the database, and none
    none = Selection(lane="install", sqlstate="")
    assert len(await dead_users(sink, none)) == 300
    assert await sink.replay(none, TABLES, check_row) == ({"install": 150}, 150)
    assert len(await dead_users(sink, none)) == 0  # those have the database's reason now
    assert await sink.drop(none) == 0
    assert len(world.users()) == 151


async def test_a_letter_that_has_no_sqlstate_gets_none_by_the_check(world: World) -> None:
    sink = await world.open()
    await load(sink, segment(1, key="k"), segment(2, key="k"))

    def check(lane: str, event: bytes, received_at: str) -> bytes:
        return EventType(lane, Install).look_closer(b"{}", received_at)

    assert await sink.replay(Selection(), TABLES, check) == ({}, 1)
    (letter,) = (await sink.find(Selection(sqlstate=""), 1))["letters"]
    assert letter["sqlstate"] is None
    assert "user_id" in letter["message"]
    assert await sink.drop(Selection(sqlstate="")) == 1


async def test_keys_at_once_in_whatever_order(world: World) -> None:
    """Two processes, the same keys: whoever is second waits, and neither for ever."""
    one, two = await world.open("one"), await world.open("two")
    await one.prepare(INSTALL)

    def of_all() -> list[Segment]:
        return [segment(n, key=f"key{n}") for n in range(20)]

    async with asyncio.timeout(20):
        done = await asyncio.gather(load(one, *of_all()), load(two, *reversed(of_all())))
    assert sorted(done) == [(0, 20, 0), (20, 0, 0)]
    assert world.users() == list(range(20))


# --- ledger ---


async def test_before_the_first_load_nothing_is_known(world: World) -> None:
    assert await (await world.open()).loaded(["x"]) == set()


async def test_the_ledger_forgets_what_is_removed_for_good(world: World) -> None:
    sink = await world.open()
    stored = [segment(n) for n in range(3)]
    await load(sink, *stored)
    await sink.expire([stored[0].id, "unknown"])
    await sink.expire([stored[0].id])  # a repeat is harmless
    ids = [each.id for each in stored]
    assert await sink.loaded(ids) == set(ids[1:])
    await sink.expire([])
    assert await sink.loaded(ids) == set(ids[1:])


async def test_a_key_is_known_when_its_segment_is_forgotten(world: World) -> None:
    sink = await world.open()
    first = segment(1, key="k")
    await load(sink, first)
    await sink.heartbeat(Heartbeat("one", "journal1", None))
    await sink.expire([first.id])
    assert await load(sink, segment(1, key="k")) == (0, 1, 0)


async def test_a_source_that_is_drained_is_forgotten_but_for_ones_own(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    theirs, other = segment(1, source="journal1"), segment(2, source="journal2")
    mine = segment(3, source="journal1")
    await load(one, theirs, other)
    await load(two, mine)
    await one.heartbeat(Heartbeat("one", "journal1", None))
    await two.heartbeat(Heartbeat("two", "journal2", None))
    await two.expire_source("journal1", "two")
    assert await two.loaded([theirs.id, other.id, mine.id]) == {other.id, mine.id}
    assert (await two.heartbeat(Heartbeat("two", "journal2", None))).keys() == {"two"}


# --- what a shared mirror asks of it ---


async def test_what_was_held_for_too_long_is_loaded_by_whoever_has_it_anew(world: World) -> None:
    sink = await world.open()
    held = [segment(n, source=SHARED) for n in range(3)]
    late = await sink.now()
    with pytest.raises(SinkUnavailable, match="held for too long") as refused:
        await load(sink, *held, not_after=late)
    assert not refused.value.everywhere
    assert await sink.loaded([each.id for each in held]) == set()
    assert world.users() == []
    assert await load(sink, *held, not_after=await sink.now() + 60) == (3, 0, 0)
    assert world.users() == [0, 1, 2]


async def test_what_was_held_for_too_long_and_is_known_is_a_duplicate(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    known = segment(1, source=SHARED)
    await load(one, known)
    assert await load(two, known, not_after=await two.now()) == (0, 1, 0)
    with pytest.raises(SinkUnavailable, match="held for too long"):
        await load(two, known, segment(2), not_after=await two.now())
    assert world.users() == [1]


async def test_what_a_shared_mirror_held_is_forgotten_by_source_lane_and_time(world: World) -> None:
    sink = await world.open()
    old, new = segment(1, source=SHARED), segment(2, source=SHARED)
    other = segment(3, lane="purchase", source=SHARED)
    others = [segment(4, source=source) for source in ("journal1", "ironmq", "nats:another")]
    for each in (old, other, *others):
        await load(sink, each)
    await load(sink, segment(6, key="k", source=SHARED))
    between = await sink.now()
    await load(sink, new)
    everything = [each.id for each in (old, new, other, *others)]
    await sink.expire_lanes(SHARED, {"install": between, "nothing": between})
    await sink.expire_lanes(
        SHARED, {"install": between, "nothing": between}
    )  # a repeat is harmless
    assert await sink.loaded(everything) == set(everything) - {old.id}
    assert await load(sink, segment(6, key="k")) == (0, 1, 0)


async def test_a_mark_is_one_for_all_processes_and_for_ever(world: World) -> None:
    sinks = [await world.open(process) for process in ("one", "two", "three")]
    assert await sinks[0].find_mark("datapipe") is None
    assert await sinks[0].find_mark("datapipe") is None  # nothing was made
    marks = await asyncio.gather(*(sink.mark("datapipe") for sink in sinks))
    assert len(set(marks)) == 1
    assert not marks[0].confirmed
    another = await sinks[0].mark("another")
    assert another.id != marks[0].id
    await sinks[0].confirm_mark("datapipe", another.id)  # it has been made anew since
    assert await sinks[1].mark("datapipe") == marks[0]
    await sinks[0].confirm_mark("datapipe", marks[0].id)
    await sinks[0].confirm_mark("datapipe", marks[0].id)
    confirmed = marks[0]._replace(confirmed=True)
    await sinks[0].expire([])
    await sinks[0].expire_source("", "two")
    await sinks[0].expire_lanes(SHARED, {"install": await sinks[0].now() + 3600})
    for sink in sinks:
        assert await sink.find_mark("datapipe") == await sink.mark("datapipe") == confirmed
    assert await sinks[0].find_mark("another") == another


async def test_its_clock_is_near_ours_and_goes_on(world: World) -> None:
    sink = await world.open()
    first, second = await sink.now(), await sink.now()
    assert time.time() - 60 < first <= second < time.time() + 60


# --- heartbeats ---


async def test_a_heartbeat_says_where_its_process_runs(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await one.heartbeat(Heartbeat("one", "one", None, host="a:1", group=SHARED))
    beats = await two.heartbeat(Heartbeat("two", "two", math.inf, host="b:2", group=SHARED))
    assert beats == {"one": Beat(1, False, "a:1", SHARED), "two": Beat(1, False, "b:2", SHARED)}
    beats = await two.heartbeat(Heartbeat("two", "two", 3.5, ended=True, host="b:2", group=SHARED))
    assert beats["two"] == Beat(2, True, "b:2", SHARED)


async def test_counts_rise_while_a_process_lives(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    first = await one.heartbeat(Heartbeat("one", "journal1", None))
    assert first.keys() == {"one"}
    await two.heartbeat(Heartbeat("two", "journal2", 1e9))
    third = await one.heartbeat(Heartbeat("one", "journal1", None))
    assert third == {"one": Beat(first["one"].count + 1, False), "two": Beat(1, False)}


async def test_others_see_that_a_process_has_ended(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await one.heartbeat(Heartbeat("one", "journal1", None))
    await one.heartbeat(Heartbeat("one", "journal1", None, ended=True))
    beats = await two.heartbeat(Heartbeat("two", "journal2", None))
    assert beats == {"one": Beat(2, True), "two": Beat(1, False)}


async def test_who_had_the_mirror_before_is_no_longer_shown(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await one.heartbeat(Heartbeat("one", "journal1", None))
    assert (await two.heartbeat(Heartbeat("two", "journal1", None))).keys() == {"two"}


async def test_the_fence_is_judged_when_the_ledger_is_written(database: str) -> None:
    """In a transaction that began before it and had to wait, where `now()` stands still."""
    async with InPostgres(database).open("one") as sink:
        await load(sink, segment(1))
        connection = psycopg2.connect(database)
        try:
            connection.cursor().execute("LOCK TABLE datapipe_ledger IN EXCLUSIVE MODE")
            not_after = await sink.now() + 1.0
            late = asyncio.create_task(load(sink, segment(2, source=SHARED), not_after=not_after))
            while not await sink.waits():
                await asyncio.sleep(0.05)
            assert await sink.now() < not_after  # so it began before
            while await sink.now() < not_after:
                await asyncio.sleep(0.05)
        finally:
            connection.close()
        with pytest.raises(SinkUnavailable, match="held for too long"):
            await late


# --- which keys are forgotten: by databases that speak SQL, the others forget none ---


class Keys:
    """A database that remembers keys for a minute, and one loaded an hour ago."""

    KNOWN, FORGOTTEN = (0, 1, 0), (1, 0, 0)

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, process: str) -> AbstractAsyncContextManager[Database]:
        return open_sink(Settings(database_url=self._url, dedupe_window=60), process)

    def age(self, table: str, column: str, hours: float, where: str = "true") -> None:
        """Make that so old."""
        ago = {
            "postgresql": f"now() - make_interval(secs => {hours * 3600})",
            "mysql": f"UTC_TIMESTAMP(6) - INTERVAL {hours * 3600} SECOND",
            "sqlite": f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{hours * 3600} seconds')",
        }[self._url.split(":")[0]]
        execute(self._url, f"UPDATE {table} SET {column} = {ago} WHERE {where}")

    async def after(self, sink: Database, beat: Heartbeat) -> tuple[int, int, int]:
        """What becomes of an event whose key was loaded an hour ago, after that heartbeat."""
        await load(sink, segment(1, key="k"))
        self.age("datapipe_ledger", "loaded_at", 1.0)
        await sink.heartbeat(beat)
        await sink.expire([])
        return await load(sink, segment(1, key="k"))


@pytest.fixture(params=["postgres", "mariadb", "sqlite"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Keys:
    urls: dict[str, Callable[[], str]] = {
        "postgres": lambda: request.getfixturevalue("database"),
        "mariadb": lambda: request.getfixturevalue("mysql_database"),
        "sqlite": lambda: f"sqlite:///{tmp_path}/events.db",
    }
    return Keys(urls[request.param]())


@pytest.mark.parametrize(
    ("oldest_s", "expected"),
    [
        (None, Keys.FORGOTTEN),
        (0.0, Keys.FORGOTTEN),
        (1800.0, Keys.FORGOTTEN),  # when that came, the key had been known for half an hour
        (3590.0, Keys.KNOWN),
        (1e6, Keys.KNOWN),
        (math.inf, Keys.KNOWN),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
async def test_keys_are_kept_for_what_waits(
    keys: Keys, oldest_s: float | None, expected: tuple[int, int, int], shared: bool
) -> None:
    async with keys.open("one") as one:
        assert (
            await keys.after(one, Heartbeat("one", "one", oldest_s, group=SHARED if shared else ""))
            == expected
        )


@pytest.mark.parametrize(
    ("dead_group", "living_group", "silent_h", "expected"),
    [
        (SHARED, SHARED, 0.05, Keys.FORGOTTEN),
        (SHARED, SHARED, 0.01, Keys.KNOWN),  # it may live
        (SHARED, "", 0.05, Keys.KNOWN),  # nobody else knows what waits in that mirror
        (SHARED, "nats:another", 0.05, Keys.KNOWN),
        ("", SHARED, 0.05, Keys.KNOWN),
        ("", "", 0.05, Keys.KNOWN),
    ],
)
async def test_what_a_dead_process_had_waiting_keeps_keys_unless_others_show_it(
    keys: Keys, dead_group: str, living_group: str, silent_h: float, expected: Any
) -> None:
    async with keys.open("dead") as dead, keys.open("living") as living:
        await dead.heartbeat(Heartbeat("dead", "dead", math.inf, group=dead_group))
        keys.age("datapipe_processes", "seen_at", silent_h)
        beat = Heartbeat("living", "living", None, group=living_group)
        assert await keys.after(living, beat) == expected


async def test_keys_are_kept_for_what_was_seen_waiting_however_late_they_are_deleted(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Keys(database).open("one") as one:
        assert isinstance(one, SqlSink)
        real = one._own

        async def late(*statements: Statement) -> Result:
            now = "(now() + interval '2 minutes')"
            return await real(*((sql.replace("now()", now), values) for sql, values in statements))

        await load(one, segment(1, key="k"))
        await one.heartbeat(Heartbeat("one", "one", 0.0))
        monkeypatch.setattr(one, "_own", late)
        await one.expire([])
        assert await load(one, segment(1, key="k")) == Keys.KNOWN


async def test_a_key_stands_as_long_as_anything_that_was_loaded_under_it(keys: Keys) -> None:
    """One lane of a POST was loaded an hour after another; then comes another body."""
    async with keys.open("one") as one:
        await load(one, segment(1, key="k"))
        keys.age("datapipe_ledger", "loaded_at", 1.0)
        assert await load(one, segment(1, lane="purchase", key="k")) == (1, 0, 0)
        await one.heartbeat(Heartbeat("one", "one", None))
        await one.expire([])
        assert await load(one, segment(2, lane="purchase", key="k")) == (0, 0, 1)


async def test_a_dead_process_is_shown_for_an_hour_if_its_mirror_is_shared(keys: Keys) -> None:
    async with keys.open("living") as living:
        for name, shared in (("shares", True), ("journals", False)):
            await living.heartbeat(Heartbeat(name, name, 1.0, group=SHARED if shared else ""))
        mine = Heartbeat("living", "living", None, group=SHARED)
        for hours, left in ((0.9, {"shares", "journals"}), (1.1, {"journals"})):
            keys.age("datapipe_processes", "seen_at", hours, "process <> 'living'")
            await living.heartbeat(mine)
            await living.expire([])
            assert (await living.heartbeat(mine)).keys() == {*left, "living"}


# --- dead letters ---


class Install(Event):
    user_id: int


def check_row(lane: str, event: bytes, received_at: str) -> bytes:
    """What the registry does: the row of an event."""
    assert received_at == AT
    return row(json.loads(event)["user_id"])


async def refusing(world: World, process: str = "one") -> Database:
    sink = await world.open(process)
    await sink.prepare(INSTALL)
    world.place.refuse_odd()
    return sink


async def dead_users(sink: Database, selection: Selection | None = None) -> list[int]:
    found = await sink.find(selection or Selection(), 1000)
    return [json.loads(bytes(letter["event"]))["user_id"] for letter in found["letters"]]


async def test_a_refused_row_costs_itself_alone(world: World) -> None:
    sink = await refusing(world)
    first = segment(1, 2, 3, 4)
    result = await sink.load(INSTALL, [first, segment(6)])
    assert counts(result) == (3, 0, 2)
    assert len(result.refused) == 2
    assert world.users() == [2, 4, 6]
    assert await load(sink, first) == (0, 4, 0)  # it was loaded, dead letters and all
    found = await sink.find(Selection(), 1)
    (group,), (letter,) = found["groups"], found["letters"]
    assert found["total"] == group["count"] == 2
    assert group["lane"] == letter["lane"] == "install"
    assert (group["sqlstate"], group["message"]) == (letter["sqlstate"], letter["message"])
    event = json.loads(bytes(letter["event"]))
    assert event == {"event_name": "install", "user_id": 3, "received_at": AT}  # the newest
    assert letter["created_at"].tzinfo is not None


async def test_dead_letters_are_counted_by_segment(world: World) -> None:
    sink, other = await refusing(world), await world.open("other")
    one, two, none = segment(1, 2, 3), segment(5, 6, key="k"), segment(8)
    result = await sink.load(INSTALL, [one, two, none])
    assert (result.dead, result.dead_of) == (3, {one.id: 2, two.id: 1})
    again = await other.load(INSTALL, [one, none, more := segment(7)])
    assert (again.dead, again.dead_of) == (1, {one.id: 2, more.id: 1})
    known = await other.outcomes([one.id, two.id, none.id, "x", more.id])
    assert known == {one.id: 2, two.id: 1, none.id: 0, more.id: 1}
    assert await other.outcomes(["x"]) == {}


async def test_dead_letters_are_found_and_dropped_by_selection(world: World) -> None:
    sink = await refusing(world)
    await load(sink, segment(1, 3, 5, 7, 9))
    letters = (await sink.find(Selection(), 100))["letters"]
    (state,) = {letter["sqlstate"] for letter in letters}
    assert await dead_users(sink) == [9, 7, 5, 3, 1]
    assert await dead_users(sink, Selection(lane="purchase")) == []
    assert await dead_users(sink, Selection(lane="install", sqlstate="00000")) == []
    assert len(await dead_users(sink, Selection(lane="install", sqlstate=state))) == 5
    ids = tuple(letter["id"] for letter in letters[:2])
    assert await dead_users(sink, Selection(ids=ids)) == [9, 7]
    assert await sink.drop(Selection(ids=())) == 0
    assert await sink.drop(Selection(ids=ids)) == 2
    assert await sink.drop(Selection(ids=ids)) == 0
    assert await sink.drop(Selection(lane="purchase")) == 0
    assert await dead_users(sink) == [5, 3, 1]
    assert await sink.count_dead() == {"install": 3}
    assert await sink.drop(Selection()) == 3
    assert await sink.count_dead() == {}
    found = await sink.find(Selection(), 100)
    assert (found["total"], found["groups"], found["letters"]) == (0, [], [])


async def test_replayed_once_and_what_is_refused_again_stays(world: World) -> None:
    sink = await refusing(world)
    await load(sink, segment(1, 3, 5))
    assert await sink.replay(Selection(), TABLES, check_row) == ({"install": 0}, 3)
    assert await dead_users(sink) == [5, 3, 1]
    world.place.accept_all()
    newest = (await sink.find(Selection(), 1))["letters"][0]["id"]
    assert await sink.replay(Selection(ids=(newest,)), TABLES, check_row) == ({"install": 1}, 0)
    assert world.users() == [5]
    assert await sink.replay(Selection(lane="install"), TABLES, check_row) == ({"install": 2}, 0)
    assert await sink.replay(Selection(), TABLES, check_row) == ({}, 0)
    assert world.users() == [1, 3, 5]
    assert await dead_users(sink) == []


async def test_more_are_replayed_than_one_transaction_takes(world: World) -> None:
    sink = await refusing(world)
    odd = range(1, 1000, 2)
    for _ in range(3):
        await load(sink, segment(*odd), accept_dead=True)
    world.place.accept_all()
    assert await sink.replay(Selection(), TABLES, check_row) == ({"install": 1500}, 0)
    assert world.users() == sorted([*odd, *odd, *odd])


async def test_what_the_check_refuses_stays_with_its_reason(world: World) -> None:
    sink = await refusing(world)
    await load(sink, segment(1))
    before = (await sink.find(Selection(), 1))["letters"][0]

    def check(lane: str, event: bytes, received_at: str) -> bytes:
        return EventType(lane, Install).look_closer(b"{}", received_at)

    assert await sink.replay(Selection(), TABLES, check) == ({}, 1)
    (letter,) = (await sink.find(Selection(), 1))["letters"]
    assert "user_id" in letter["message"]
    assert letter == {**before, "message": letter["message"]}
    assert world.users() == []


async def test_a_table_that_refuses_nearly_all_is_blocked_and_nothing_is_dead(
    world: World,
) -> None:
    sink = await refusing(world)
    odd = segment(*range(1, 201, 2))
    with pytest.raises(LaneBlocked, match="refuses 100 of 101 rows"):
        await load(sink, odd, segment(2))
    assert await sink.loaded([odd.id]) == set()
    assert (world.users(), await dead_users(sink)) == ([], [])
    assert await load(sink, segment(2)) == (1, 0, 0)
    assert await load(sink, odd, accept_dead=True) == (0, 0, 100)
    assert len(await dead_users(sink)) == 100


# --- unknown events ---

KEPT = Table(UNKNOWN, UnknownType.columns)
HOURS = Table(UNKNOWN, UnknownType.columns, retention_s=7200)
ALL_KEPT = Selection(shelf=Shelf.UNKNOWN)
# as it was sent: digits, white space, escapes, a key twice
SENT = '{"event_name" : "install",\t"user_id": 7, "n": 1.50, "t": "a\\tb\\\\n\\u00e9é", "n": 2}'


def kept(*events: tuple[str, str], at: str = AT) -> Segment:
    """A segment of unknown events: their names, and the events as they were sent."""
    rows = [f"{name}\t{escape(text)}\t{at}\n".encode() for name, text in events]
    return Segment(UNKNOWN, KEPT.columns, b"".join(rows), len(rows))


async def keep(sink: Database, *events: tuple[str, str], at: str = AT) -> None:
    assert counts(await sink.load(KEPT, [kept(*events, at=at)])) == (len(events), 0, 0)


async def names(sink: Database, selection: Selection = ALL_KEPT) -> dict[str, int]:
    groups = (await sink.find(selection, 0))["groups"]
    return {group["event_name"]: group["count"] for group in groups}


async def test_where_none_were_kept_there_is_nothing(world: World) -> None:
    sink = await world.open()
    await sink.prepare(INSTALL)
    assert await sink.find(ALL_KEPT, 10) == {"total": 0, "groups": [], "letters": []}
    assert await sink.replay(ALL_KEPT, TABLES, check_row) == ({}, 0)
    assert await sink.drop(ALL_KEPT) == 0
    assert await sink.samples(["a"], 3) == {"a": []}
    assert await sink.remove_expired(HOURS) is False


async def test_unknown_events_are_found_as_they_were_sent_and_dropped_by_selection(
    world: World,
) -> None:
    sink = await world.open()
    await keep(sink, ("b", "{}"), ("a", SENT), ("b", '{"x": 1}'), ("b", '{"x": 2}'))
    found = await sink.find(ALL_KEPT, 3)
    assert found["total"] == 4
    assert await names(sink) == {"b": 3, "a": 1}
    assert {(g["refused"], g["message"]) for g in found["groups"]} == {(0, None)}
    newest = [(e["event_name"], bytes(e["event"]).decode()) for e in found["letters"]]
    assert newest == [("b", '{"x": 2}'), ("b", '{"x": 1}'), ("a", SENT)]
    (event,) = (await sink.find(Selection(lane="a", shelf=Shelf.UNKNOWN), 9))["letters"]
    assert event["received_at"] == datetime.fromisoformat(AT)
    assert event["message"] is None
    several = [f"n{n}" for n in range(150)]
    found = await sink.samples(["a", "b", "c", *several], 2)
    assert (found["a"], found["b"], found["c"]) == ([SENT], ['{"x": 2}', '{"x": 1}'], [])
    assert await sink.drop(Selection(ids=(event["id"],), shelf=Shelf.UNKNOWN)) == 1
    assert await sink.drop(Selection(lane="a", shelf=Shelf.UNKNOWN)) == 0
    assert await sink.drop(Selection(lanes=("a", "b"), shelf=Shelf.UNKNOWN)) == 3
    assert await names(sink) == {}
    await keep(sink, *[("b", "{}")] * 2500)
    assert await sink.drop(ALL_KEPT) == 2500


async def test_unknown_events_are_replayed_once_and_what_is_refused_stays(world: World) -> None:
    sink = await world.open()
    await sink.prepare(INSTALL)
    world.place.refuse_odd()
    event = '{{"event_name": "install", "user_id": {}}}'
    sent = [("install", event.format(user)) for user in range(2000, 4000, 2)]
    await keep(sink, ("other", "{}"), ("install", event.format(1)), *sent)

    def check(lane: str, event: bytes, received_at: str) -> bytes:
        assert neutral_time(received_at) == neutral_time(AT)
        return row(json.loads(event)["user_id"])

    known = Selection(lanes=tuple(TABLES), shelf=Shelf.UNKNOWN)
    assert await sink.replay(known, TABLES, check) == ({"install": 1000}, 1)
    assert world.users() == list(range(2000, 4000, 2))
    assert await names(sink) == {"install": 1, "other": 1}
    (refused,) = (await sink.find(known, 9))["letters"]
    (group,) = (await sink.find(known, 0))["groups"]
    assert refused["message"]
    assert (group["refused"], group["message"]) == (1, refused["message"])
    assert bytes(refused["event"]).decode() == event.format(1)
    world.place.accept_all()
    assert await sink.replay(known, TABLES, check) == ({"install": 1}, 0)
    assert world.users() == [1, *range(2000, 4000, 2)]
    assert await names(sink) == {"other": 1}


async def test_what_no_table_takes_of_the_unknown_is_a_dead_letter_as_any(world: World) -> None:
    sink = await world.open()
    segment = kept(("install", SENT))
    assert counts(await sink.load(KEPT, [segment])) == (1, 0, 0)
    assert counts(await sink.load(KEPT, [segment])) == (0, 1, 0)  # by the ledger, as any
    event = event_json(UNKNOWN, KEPT.columns, segment.data).encode()
    assert UnknownType().replayed(event, AT) == segment.data


async def test_unknown_events_expire_by_when_they_were_received(world: World) -> None:
    sink = await world.open()
    old, new = (f"{datetime.now(UTC) - timedelta(hours=h):%Y-%m-%d %H:%M:%S}" for h in (3, 1))
    await keep(sink, ("new", "{}"), at=new)
    await keep(sink, *[("old", "{}")] * 1500, at=old)
    while await sink.remove_expired(HOURS):
        assert "new" in await names(sink)
    assert await names(sink) == {"new": 1}
    assert await sink.remove_expired(HOURS) is False
    assert await sink.remove_expired(KEPT) is False  # for ever


async def test_so_many_names_are_told_apart(world: World) -> None:
    sink = await world.open()
    few = [(f"n{n}", "{}") for n in range(1200)]
    await keep(sink, *few, ("often", "{}"), ("often", "{}"))
    found = await sink.find(ALL_KEPT, 0)
    assert (found["total"], len(found["groups"])) == (1202, 1000)
    assert found["groups"][0]["event_name"] == "often"


# --- tables, and how it is ---


async def test_preparing_is_repeated_by_whoever_comes(world: World) -> None:
    sinks: Sequence[Database] = [await world.open(process) for process in ("one", "two", "three")]
    await asyncio.gather(*(sink.prepare(INSTALL) for sink in sinks))
    for sink in sinks:
        await sink.prepare(INSTALL)
    assert world.users() == []


async def test_a_new_column_is_added_and_older_segments_load(world: World) -> None:
    sink = await world.open()
    await load(sink, segment(1))
    wider = Table("install", (USER, Column("note", "text"), RECEIVED))
    await sink.prepare(wider)
    new = Segment("install", wider.columns, f"2\ta note\t{AT}\n".encode(), 1)
    result = await sink.load(wider, [new, segment(3), Segment(*_parts_of(new))])
    assert counts(result) == (3, 0, 0)
    assert world.users() == [1, 2, 2, 3]


def _parts_of(segment: Segment) -> tuple[Any, ...]:
    return segment.lane, segment.columns, segment.data, segment.events


# the memory has no tables
with_tables = pytest.mark.parametrize(
    "world", ["postgres", "mariadb", "sqlite", "toy"], indirect=True
)


@with_tables
async def test_a_table_of_somebody_else_is_left_alone(world: World) -> None:
    """One without received_at: the lane is blocked, until that column is there."""
    world.place.execute("CREATE TABLE install (user_id bigint, machine text)")
    sink = await world.open()
    mine = Table("install", (USER, Column("note", "text"), RECEIVED))
    levels = [level for level, text in await sink.check([mine, PURCHASE]) if "install" in text]
    assert levels == ["fail"]
    with pytest.raises(LaneBlocked, match="received_at") as prepared:
        await sink.prepare(mine)
    one = Segment("install", mine.columns, f"1\ta note\t{AT}\n".encode(), 1)
    with pytest.raises(LaneBlocked, match="received_at"):
        await sink.load(mine, [one])
    assert await load(sink, segment(2, lane="purchase")) == (1, 0, 0)
    with pytest.raises(Exception, match="note"):  # it has not been added
        world.place.execute("SELECT note FROM install")
    world.place.execute(str(prepared.value)[str(prepared.value).index("ALTER TABLE") :])
    assert counts(await sink.load(mine, [one])) == (1, 0, 0)
    assert world.users() == [1]


@with_tables
async def test_what_is_made_is_said(world: World) -> None:
    sink = await world.open()
    assert any("CREATE TABLE" in made and "install" in made for made in await sink.prepare(INSTALL))
    assert await sink.prepare(INSTALL) == []
    wider = Table("install", (USER, Column("note", "text"), RECEIVED))
    (made,) = await sink.prepare(wider)
    assert "ALTER TABLE" in made
    assert "note" in made


@with_tables
async def test_a_replay_touches_no_table_but_those_of_its_letters(world: World) -> None:
    sink = await world.open()
    await sink.prepare(INSTALL)
    world.place.refuse_odd()
    await load(sink, segment(1))
    world.place.accept_all()
    back = await sink.replay(Selection(), TABLES, lambda *event: row(1))
    assert back == ({"install": 1}, 0)
    with pytest.raises(Exception, match="purchase"):
        world.users("purchase")


async def test_the_ddl_is_text_that_names_each_table_or_nothing(world: World) -> None:
    sink = await world.open()
    text = sink.ddl([INSTALL, PURCHASE])
    assert not text or all(name in text for name in ("install", "purchase", "datapipe_ledger"))
    assert sink.state().up is None  # nobody was asked


async def test_the_state_is_that_of_the_last_real_work(world: World) -> None:
    sink = await world.open()
    assert (sink.state().up, sink.state().error) == (None, None)
    await load(sink, segment(1))
    state = sink.state()
    assert (state.up, state.error) == (True, None)
    assert state.schema


async def test_the_check_changes_nothing_and_finds_nothing_wrong(world: World) -> None:
    sink = await world.open()
    for _ in range(2):
        findings = await sink.check([INSTALL])
        assert {level for level, _ in findings} == {"ok"}
        await sink.prepare(INSTALL)
    assert isinstance(await sink.hint("install"), str)
    assert await sink.waits() == {}


async def test_what_is_aborted_is_tried_again_by_the_next_process(world: World) -> None:
    sink = await world.open()
    first = segment(*range(10))
    loading = asyncio.create_task(load(sink, first))
    await asyncio.sleep(0)
    sink.abort()
    await asyncio.wait([loading])
    again = await world.open("two")
    loaded, duplicate, dead = await load(again, first)
    assert (loaded + duplicate, dead) == (10, 0)
    assert world.users() == list(range(10))
    if not loading.cancelled():
        loading.exception()
