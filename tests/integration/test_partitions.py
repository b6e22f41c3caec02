"""Partitions and retention, by the sink alone: what it makes, removes and says, and what locks do.

Clocks that are wrong, and events that waited for long, are rows that were received then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import pytest

from datapipe.errors import LaneBlocked
from datapipe.events.registry import declared_class
from datapipe.events.segment import Segment
from datapipe.events.types import EventType
from datapipe.events.unknown import UnknownType
from datapipe.settings import Settings
from datapipe.sinks import Database, Loaded, Selection, Table, open_sink, table_of
from tests.pgbouncer import PgBouncer
from tests.postgres import VERSIONS, Postgres


class World:
    """A database, a sink, and the event type `seen` with these options."""

    def __init__(self, url: str, sink: Database, **options: str) -> None:
        self.url = url
        self.sink = sink
        self.now = datetime.now(UTC)  # the servers of the tests have this machine's clock
        named = {f"@{name}": value for name, value in options.items()}
        self.kind = EventType("seen", declared_class("seen", {"n": "int", **named}))

    @property
    def table(self) -> Table:
        return table_of(self.kind)

    def execute(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return Postgres.execute(self.url, sql, *values)

    async def load(self, *days: float, first: int = 0) -> Loaded:
        """One load of an event for each, received so many days from now."""
        rows = b"".join(
            self.kind.look_closer(
                b'{"n": %d}' % n, f"{self.now + timedelta(days=day):%Y-%m-%d %H:%M:%S}"
            )
            for n, day in enumerate(days, first)
        )
        segment = Segment("seen", self.kind.columns, rows, len(days))
        return await self.sink.load(self.table, [segment])

    async def remove(self) -> int:
        """Remove what is due; how many steps it took."""
        steps = 1
        while await self.sink.remove_expired(self.table):
            steps += 1
        return steps

    def name(self, day: float) -> str:
        """Of the partition of the day that is so many from now."""
        return f"seen_p{self.now + timedelta(days=day):%Y%m%d}"

    def numbers(self) -> list[int]:
        return [n for (n,) in self.execute("SELECT n FROM seen ORDER BY n")]

    def partitions(self) -> list[str]:
        sql = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'seen'::regclass"
        return sorted(name for (name,) in self.execute(sql))

    def tables(self) -> list[str]:
        sql = "SELECT relname FROM pg_class WHERE relname LIKE 'seen%' AND relkind IN ('r', 'p')"
        return sorted(name for (name,) in self.execute(sql))

    async def said(self) -> list[tuple[str, str]]:
        """What `check` says of the table."""
        found = await self.sink.check([self.table])
        return [(level, text) for level, text in found if text.startswith("table seen")]


@asynccontextmanager
async def world_of(url: str, **options: str) -> AsyncIterator[World]:
    async with open_sink(Settings(database_url=url), "test") as sink:
        yield World(url, sink, **options)


@pytest.fixture
async def daily(database: str) -> AsyncIterator[World]:
    async with world_of(database, partition="day", retention="90 days") as world:
        yield world


@pytest.mark.parametrize("version", ["", *VERSIONS])
async def test_whatever_the_clock_said_it_is_loaded_and_goes_by_the_database_s(
    request: pytest.FixtureRequest, version: str
) -> None:
    server: Postgres = request.getfixturevalue(f"postgres{version}")
    url = server.create_database()
    async with world_of(url, partition="day", retention="90 days") as world:
        loaded = await world.load(0, 40, -400, -400, -100, -80)
        assert (loaded.loaded, loaded.dead) == (6, 0)
        assert world.partitions() == sorted(map(world.name, (0, 40, -400, -100, -80)))
        assert await world.remove() == 2 * 2 + 1  # detached, dropped; nothing more
        assert world.tables() == sorted(["seen", *map(world.name, (0, 40, -80))])
        assert world.numbers() == [0, 1, 5]
        made = await world.sink.make_ahead(world.table)
        assert len(made) == 2 * 3
        assert world.partitions() == sorted(map(world.name, (-80, 0, 1, 2, 3, 40)))
        assert await world.sink.make_ahead(world.table) == []
        again = await world.load(-400, 2, first=10)
        assert again.loaded == 2
        assert world.numbers() == [0, 1, 5, 10, 11]


async def test_columns_that_come_later_and_those_of_others_are_in_each_partition(
    daily: World,
) -> None:
    await daily.load(0)
    daily.execute(
        "ALTER TABLE seen ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY;"
        "CREATE INDEX ON seen (n); ALTER TABLE seen ADD CHECK (n >= 0)"
    )
    fields = {"n": "int", "more": 'str = "x"', "@partition": "day"}
    daily.kind = EventType("seen", declared_class("seen", fields))
    loaded = await daily.load(0, 5, first=1)
    assert loaded.loaded == 2
    rows = daily.execute("SELECT n, more, id IS NOT NULL FROM seen ORDER BY n")
    assert rows == [(n, "x", True) for n in range(3)]
    ids = daily.execute("SELECT count(DISTINCT id) FROM seen")
    assert ids == [(3,)]


async def test_a_setting_that_changes_fills_what_is_left(database: str) -> None:
    """Weeks and months are cut where days are already there."""
    for options in ({"partition": "day"}, {"partition": "week"}, {"partition": "month"}):
        async with world_of(database, **options) as world:
            await world.load(-3, 0, 3, 30, 90)
            await world.sink.make_ahead(world.table)
            assert [text for level, text in await world.said() if level != "ok"] == []
    assert len(world.numbers()) == 15
    assert len(world.partitions()) > 8


async def test_dead_letters_come_back_into_partitions_that_are_gone(daily: World) -> None:
    await daily.load(-100)
    daily.execute("ALTER TABLE seen ADD CONSTRAINT even CHECK (n % 2 = 0)")
    assert (await daily.load(-100, -50, 0, first=1)).dead == 2
    await daily.remove()
    daily.execute("ALTER TABLE seen DROP CONSTRAINT even")

    def check(lane: str, raw: bytes, received_at: str) -> bytes:
        return daily.kind.look_closer(raw, received_at)

    back = await daily.sink.replay(Selection(), {"seen": daily.table}, check)
    assert back == ({"seen": 2}, 0)
    assert daily.execute(
        "SELECT n, date_trunc('second', received_at) = %s FROM seen ORDER BY n",
        daily.now.replace(microsecond=0) - timedelta(days=100),
    ) == [(1, True), (2, False), (3, False)]


async def test_whoever_dies_between_detach_and_drop(daily: World) -> None:
    """And an event of that very day comes in between."""
    await daily.load(-100)
    assert await daily.sink.remove_expired(daily.table)
    assert daily.partitions() == []
    assert daily.tables() == ["seen", daily.name(-100)]
    async with world_of(daily.url, partition="day", retention="90 days") as another:
        await another.load(-100, first=7)
        assert another.partitions() == [f"{daily.name(-100)}_2"]
        assert another.numbers() == [7]
        await another.remove()
    assert daily.tables() == ["seen"]


async def test_check_names_what_keeps_a_partition_from_being_dropped(daily: World) -> None:
    """Before it is detached, and then, when none is dropped after it."""
    await daily.load(-100, -99)
    assert [text for level, text in await daily.said() if level == "warn"] == []
    daily.execute(f"CREATE VIEW report AS SELECT n FROM {daily.name(-100)}")
    stuck = f"table seen: partition {daily.name(-100)} can't be dropped, nor any after it: "
    assert ("warn", f"{stuck}report depends on it") in await daily.said()
    assert await daily.sink.remove_expired(daily.table)
    with pytest.raises(LaneBlocked, match="other objects depend on it"):
        await daily.sink.remove_expired(daily.table)
    assert ("warn", f"{stuck}report depends on it") in await daily.said()
    daily.execute("DROP VIEW report")
    await daily.remove()
    assert daily.tables() == ["seen"]


async def test_what_a_person_has_detached_stays(daily: World) -> None:
    await daily.load(-100)
    daily.execute(f"ALTER TABLE seen DETACH PARTITION {daily.name(-100)}")
    assert await daily.remove() == 1
    assert daily.tables() == ["seen", daily.name(-100)]


async def test_what_a_person_attaches_again_is_a_partition_as_before(daily: World) -> None:
    await daily.load(-100)
    assert await daily.sink.remove_expired(daily.table)
    start = (daily.now - timedelta(days=100)).date()
    bounds = f"FROM ('{start} 00:00Z') TO ('{start + timedelta(days=1)} 00:00Z')"
    daily.execute(f"ALTER TABLE seen ATTACH PARTITION {daily.name(-100)} FOR VALUES {bounds}")
    async with world_of(daily.url, partition="day", retention="200 days") as patient:
        assert await patient.remove() == 1
        assert patient.numbers() == [0]


async def test_who_reads_for_long_holds_up_no_load(daily: World) -> None:
    """Partitions are made meanwhile; one that is too old goes once the reader has."""
    await daily.load(-100, 0)
    reader = psycopg2.connect(daily.url)
    reader.cursor().execute("SELECT * FROM seen")  # and its transaction stays open
    removal = asyncio.create_task(daily.sink.remove_expired(daily.table))
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
    async with asyncio.timeout(5):
        while not daily.execute(waits):
            await asyncio.sleep(0.01)
    began = time.monotonic()
    loaded = await daily.load(0, 50, first=10)
    assert time.monotonic() - began < 2.5
    assert (loaded.loaded, await removal) == (2, False)
    assert await daily.remove() == 1
    (_, text), *_ = [each for each in await daily.said() if "next" in each[1]]
    assert text.endswith(
        f"next to be removed: partition {daily.name(-100)}, as soon as nobody holds it"
    )
    began = time.monotonic()
    await daily.sink.make_ahead(daily.table)
    assert time.monotonic() - began < 0.9
    reader.rollback()
    reader.cursor().execute(f"SELECT * FROM {daily.name(-100)}")
    began = time.monotonic()
    assert await daily.remove() == 1
    assert time.monotonic() - began < 0.9
    reader.rollback()
    reader.close()
    assert await daily.remove() == 3
    assert daily.name(-100) not in daily.tables()


async def test_only_one_removes_at_a_time(daily: World) -> None:
    await daily.load(-100)
    holder = psycopg2.connect(daily.url)
    holder.cursor().execute(f"SELECT pg_advisory_xact_lock({0x64617461_70697065 + 1})")
    assert await daily.remove() == 1
    holder.rollback()
    holder.close()
    assert await daily.remove() == 3


async def test_two_that_make_the_same_make_it_once(daily: World) -> None:
    await daily.load(0)
    async with world_of(daily.url, partition="day") as another:
        loads = [each.load(5, 6, first=n) for n, each in enumerate((daily, another) * 3)]
        assert sum(each.loaded for each in await asyncio.gather(*loads)) == 12
    assert daily.partitions() == sorted(map(daily.name, (0, 5, 6)))


async def test_behind_a_pooler_of_one_connection(database: str) -> None:
    with PgBouncer.running(database, pool_mode="transaction", default_pool_size=1) as pooler:
        async with world_of(pooler.url, partition="day", retention="90 days") as world:
            assert (await world.load(0, 40, -400)).loaded == 3
            await world.sink.make_ahead(world.table)
            assert await world.remove() == 3
    async with world_of(database, partition="day", retention="90 days") as world:
        assert world.partitions() == sorted(map(world.name, (0, 1, 2, 3, 40)))
        assert world.numbers() == [0, 1]


# --- tables that were there before ---

PLAIN = "CREATE TABLE seen (n bigint, received_at timestamptz)"


async def test_a_plain_table_is_loaded_as_it_is_until_it_is_adopted(daily: World) -> None:
    daily.execute(PLAIN)
    daily.execute("COMMENT ON TABLE seen IS '100 % our ''own'' words'")
    assert (await daily.load(0, -100)).loaded == 2
    assert await daily.remove() == 1
    assert await daily.sink.make_ahead(daily.table) == []
    (_, plain), (_, foreign) = await daily.said()
    assert "as a plain table: it gets no partitions, and loads all the same" in plain
    assert foreign.endswith("to change that: datapipe schema --adopt seen")
    assert {level for level, _ in await daily.said()} == {"warn"}
    with pytest.raises(LaneBlocked, match="CREATE INDEX CONCURRENTLY"):
        await daily.sink.adopt(daily.table, print)
    daily.execute('CREATE INDEX CONCURRENTLY "seen_received_at" ON "public"."seen" (received_at)')
    told: list[str] = []
    await daily.sink.adopt(daily.table, told.append)
    assert f"before {daily.now - timedelta(days=90):%Y-%m-%d}" in told[0]
    (comment,) = daily.execute("SELECT obj_description('seen'::regclass)")
    assert comment == ("100 % our 'own' words\nkept by datapipe",)
    assert daily.numbers() == [0, 1]
    assert await daily.remove() == 1
    assert daily.numbers() == [0]
    assert (await daily.load(0, -100, first=2)).loaded == 2
    assert [level for level, _ in await daily.said()] == ["warn", "ok"]


@pytest.mark.parametrize("kind", ["timestamptz", "timestamp"])
async def test_a_partitioned_table_of_others_is_adopted_as_it_is(database: str, kind: str) -> None:
    """Its bounds are odd, one has none at all; and so are the time zone and the date style."""
    noon = (datetime.now(UTC) - timedelta(days=1)).replace(
        hour=12, minute=34, second=0, microsecond=0
    )
    old = noon - timedelta(days=200)
    Postgres.execute(
        database,
        f"CREATE TABLE seen (n bigint, received_at {kind}) PARTITION BY RANGE (received_at);"
        "CREATE SCHEMA attic; CREATE TABLE attic.oldest PARTITION OF seen"
        f" FOR VALUES FROM (MINVALUE) TO ('{old}');"
        f"CREATE TABLE odd PARTITION OF seen FOR VALUES FROM ('{old}') TO ('{noon}')",
    )
    name = database.rpartition("/")[2]
    for setting in ("timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'"):
        Postgres.execute(database, f"ALTER DATABASE {name} SET {setting}")
    async with world_of(database, partition="day", retention="90 days") as world:
        with pytest.raises(LaneBlocked, match="datapipe schema --adopt seen"):
            await world.load(0)
        told: list[str] = []
        await world.sink.adopt(world.table, told.append)
        assert "['oldest']" in "".join(told)
        behind = (noon + timedelta(minutes=2) - world.now) / timedelta(days=1)
        assert (await world.load(0, behind, -100, -300)).loaded == 4
        await world.remove()
        assert world.numbers() == [0, 1, 2]
        assert world.execute("SELECT to_regclass('attic.oldest')") == [(None,)]
        assert "odd" in world.partitions()


async def test_partitions_by_something_else_are_not_ours(daily: World) -> None:
    daily.execute(PLAIN + " PARTITION BY LIST (n)")
    daily.execute("CREATE TABLE one PARTITION OF seen FOR VALUES IN (0)")
    assert (await daily.load(0)).loaded == 1
    with pytest.raises(LaneBlocked, match="something else"):
        await daily.sink.adopt(daily.table, print)


async def test_a_default_partition_is_told(daily: World) -> None:
    await daily.load(0)
    daily.execute("CREATE TABLE rest PARTITION OF seen DEFAULT")
    assert (await daily.load(-400)).loaded == 1
    levels = [level for level, text in await daily.said()]
    assert levels == ["warn", "ok", "ok"]
    await daily.sink.make_ahead(daily.table)


# --- retention without partitions ---


@pytest.mark.parametrize("version", ["", *VERSIONS])
async def test_rows_go_in_small_steps(request: pytest.FixtureRequest, version: str) -> None:
    server: Postgres = request.getfixturevalue(f"postgres{version}")
    url = server.create_database()
    async with world_of(url, retention="90 days") as world:
        await world.load(-1, -89, -91)
        world.execute(
            "INSERT INTO seen SELECT n, now() - interval '100 days'"
            " FROM generate_series(10, 2009) AS n"
        )
        assert await world.remove() == 3
        assert world.numbers() == [0, 1]
        world.execute("CREATE TABLE child () INHERITS (seen)")
        world.execute("INSERT INTO child SELECT n, now() FROM generate_series(50, 3049) AS n")
        await world.load(-91, first=5)
        assert await world.remove() == 1
        assert world.numbers() == [0, 1, *range(50, 3050)]
        world.execute("DROP TABLE child")
        ((level, text),) = await world.said()
        assert level == "ok"
        assert f"its oldest row, after {world.now + timedelta(days=1):%Y-%m-%d}" in text
        world.execute("DROP INDEX seen_received_at_idx")
        await world.load(-91, first=5)
        ((level, text),) = await world.said()
        assert level == "fail"
        with pytest.raises(LaneBlocked, match="nothing is removed without an index"):
            await world.remove()
        world.execute(text.partition("received_at: ")[2])
        assert await world.remove() == 1
        assert world.numbers() == [0, 1]
        world.execute("ALTER TABLE seen RENAME TO before")
        assert (await world.load(0)).loaded == 1
        assert world.numbers() == [0]


async def test_a_removal_that_takes_too_long_is_told(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datapipe.sinks.postgres.database._STEP_MS", 200)
    async with world_of(database, retention="90 days") as world:
        await world.load(-100)
        world.execute(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN PERFORM pg_sleep(5); RETURN OLD; END';"
            "CREATE TRIGGER t BEFORE DELETE ON seen FOR EACH ROW EXECUTE FUNCTION f()"
        )
        with pytest.raises(LaneBlocked, match=r"seen: what is too old can't be removed in time"):
            await world.remove()
        world.execute("DROP TRIGGER t ON seen")
        await world.remove()
        assert world.numbers() == []


async def test_the_table_of_unknown_events_has_a_retention_of_its_own(database: str) -> None:
    """It is ours anyway: nobody need adopt it."""
    async with world_of(database) as world:
        table = table_of(UnknownType(retention_s=1))
        await world.sink.prepare(table)
        assert [text for level, text in await world.sink.check([table]) if level != "ok"] == []


# --- rights ---


async def test_rights_that_are_lacking_are_named(database: str) -> None:
    role = f"role_{database[-8:]}"
    options = {"partition": "day", "retention": "90 days"}
    async with world_of(database, **options) as owner:
        await owner.load(0, -95)
        await owner.sink.make_ahead(owner.table)
        grants = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"
        owner.execute(f"CREATE ROLE {role} LOGIN; GRANT {grants} TO {role}")
        owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    async with world_of(database.replace("postgres@", f"{role}@"), **options) as world:
        assert (await world.load(1, first=11)).loaded == 1
        ((level, text),) = await world.said()
        assert level == "fail"
        with pytest.raises(LaneBlocked) as error:
            await world.load(-100, first=2)
        assert str(error.value) == text
        Postgres.execute(database, text.partition("partitions: ")[2])
        assert (await world.load(-100, first=2)).loaded == 1
        assert await world.sink.remove_expired(world.table)
        assert await world.sink.remove_expired(world.table)
        with pytest.raises(LaneBlocked) as error:
            await world.remove()
        assert world.name(-95) in str(error.value)
        Postgres.execute(database, str(error.value).partition("may not remove it: ")[2])
        assert await world.remove() == 3
        assert Postgres.execute(database, "SELECT n FROM seen ORDER BY n") == [(0,), (11,)]
