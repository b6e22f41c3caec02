"""The SQLSTATE policy, class by class: what PostgreSQL says, and what becomes of the events.

Each test has a lane of its own, hurts its table, and sees that another lane goes on.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import pytest_asyncio

from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import running

FIELDS = {"n": "int", "t": "str?"}
KEEP = "CREATE FUNCTION {lane}_f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {code} END$$;"
TRIGGER = KEEP + "CREATE TRIGGER t {when} INSERT ON {lane} FOR EACH ROW EXECUTE FUNCTION {lane}_f()"


def trigger(code: str, when: str = "BEFORE") -> str:
    return TRIGGER.replace("{code}", code).replace("{when}", when)


# what is done to the table, the SQLSTATE of the event {"n": 13, "t": null}; n = 0 is there already
REFUSES = {
    "checked": ("ALTER TABLE {lane} ADD CHECK (n <> 13)", "23514"),
    "not_null": ("ALTER TABLE {lane} ALTER t SET NOT NULL", "23502"),
    "twice": ("INSERT INTO {lane} (n) VALUES (13); ALTER TABLE {lane} ADD UNIQUE (n)", "23505"),
    "twice_deferred": (
        "INSERT INTO {lane} (n) VALUES (13);"
        "ALTER TABLE {lane} ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED",
        "23505",
    ),
    "foreign_key": (
        "CREATE TABLE {lane}_p (n bigint PRIMARY KEY);"
        "INSERT INTO {lane}_p SELECT i FROM generate_series(0, 100) i WHERE i <> 13;"
        "ALTER TABLE {lane} ADD FOREIGN KEY (n) REFERENCES {lane}_p",
        "23503",
    ),
    "foreign_key_deferred": (
        "CREATE TABLE {lane}_p (n bigint PRIMARY KEY);"
        "INSERT INTO {lane}_p SELECT i FROM generate_series(0, 100) i WHERE i <> 13;"
        "ALTER TABLE {lane} ADD FOREIGN KEY (n) REFERENCES {lane}_p INITIALLY DEFERRED",
        "23503",
    ),
    "exclusion": (
        "INSERT INTO {lane} (n) VALUES (13);"
        "ALTER TABLE {lane} ADD EXCLUDE USING btree (n WITH =) WHERE (n = 13)",
        "23P01",
    ),
    "out_of_range": (
        "ALTER TABLE {lane} ALTER n TYPE smallint USING 0;" + trigger(
            "IF NEW.n = 13 THEN NEW.n := 70000; END IF; RETURN NEW;"
        ),
        "22003",
    ),
    "too_long": (
        "ALTER TABLE {lane} ALTER t TYPE varchar(3);"
        + trigger("IF NEW.n = 13 THEN NEW.t := 'four'; END IF; RETURN NEW;"),
        "22001",
    ),
    "raised": (
        trigger("IF NEW.n = 13 THEN RAISE 'not this one, line 1'; END IF; RETURN NEW;"),
        "P0001",
    ),
    "raised_after": (
        trigger("IF NEW.n = 13 THEN RAISE 'not this one'; END IF; RETURN NULL;", "AFTER"),
        "P0001",
    ),
    "limited": (
        trigger("IF NEW.n = 13 THEN RAISE USING ERRCODE = '54000'; END IF; RETURN NEW;"),
        "54000",
    ),
    "of_nobody": (  # a class that the table of policies does not know, with a COPY line
        trigger("IF NEW.n = 13 THEN RAISE USING ERRCODE = 'ZZ001'; END IF; RETURN NEW;"),
        "ZZ001",
    ),
}  # fmt: skip

# what is done to the table, the SQLSTATE, what mends it
BLOCKS = {
    "permission": (
        "REVOKE INSERT ON {lane} FROM app", 'GRANT INSERT ON "public"."permission" TO "app"',
        "GRANT INSERT ON {lane} TO app",
    ),
    "seen": (
        "ALTER TABLE {lane} RENAME TO {lane}_t; CREATE VIEW {lane} AS SELECT * FROM {lane}_t;"
        "ALTER VIEW {lane} OWNER TO app",
        "42809",
        "DROP VIEW {lane}; ALTER TABLE {lane}_t RENAME TO {lane}",
    ),
    "generated": (
        "ALTER TABLE {lane} DROP t; ALTER TABLE {lane} ADD t text GENERATED ALWAYS AS ('') STORED",
        "42P10",
        "ALTER TABLE {lane} DROP t; ALTER TABLE {lane} ADD t text",
    ),
}  # fmt: skip

# codes of a table that can't be loaded now; nobody else need wait
LATER = ("40001", "55006", "57014", "25P03")
# codes that say "the whole database"; a table that alone says so must not hold up the others
EVERYWHERE = ("53100", "53200", "58030", "XX000", "25006", "08006")
# lanes with a test of their own
OTHERS = ("locked", "deadlock", "dropped", "less", "retyped", "crammed", "other")

LANES = [
    *REFUSES,
    *BLOCKS,
    *(f"later_{code.lower()}" for code in LATER),
    *(f"all_{code.lower()}" for code in EVERYWHERE),
    *OTHERS,
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


def as_app(postgres: Postgres, database: str) -> str:
    """The URL of a role that is no superuser and may make tables."""
    with suppress(psycopg2.errors.DuplicateObject):
        postgres.execute(database, "CREATE ROLE app LOGIN")
    postgres.execute(database, "GRANT ALL ON SCHEMA public TO app")
    return database.replace("postgres@", "app@")


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> str:
    return postgres.create_database()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, database: str
) -> AsyncIterator[Service]:
    async with running(
        tmp_path_factory.mktemp("states"), database_url=as_app(postgres, database),
        events=dict.fromkeys(LANES, FIELDS), event_modules=["tests.fault.modules.quick_locks"],
        load_interval=0.5,
    ) as service:  # fmt: skip
        await post(service, "other", 0)
        await service.drained()
        yield service


async def post(service: Service, lane: str, *numbers: int, t: str | None = None) -> None:
    events = [{"event_name": lane, "n": n, "t": t if t else str(n)} for n in numbers]
    for event in events:
        if event["n"] == 13:
            event["t"] = t
    assert (await service.post(events))[0] == 200


def rows(database: str, lane: str) -> list[int]:
    return [n for (n,) in Postgres.execute(database, f"SELECT n FROM {lane} ORDER BY n")]


async def lane_of(service: Service, lane: str) -> dict[str, Any]:
    found: dict[str, Any] = (await service.status())["lanes"][lane]
    return found


async def lane_drained(service: Service, lane: str) -> dict[str, Any]:
    async def empty() -> bool:
        return bool((await lane_of(service, lane))["waiting"] == 0)

    await until(empty, 40, f"an empty lane {lane}")
    return await lane_of(service, lane)


async def others_go_on(service: Service, database: str) -> None:
    before = len(rows(database, "other"))
    await post(service, "other", 1)
    await lane_drained(service, "other")
    assert len(rows(database, "other")) == before + 1


async def balanced(service: Service, lane: str, loaded: int, dead: int = 0) -> None:
    """All of the lane is where it should be, and nothing of it was doubled."""
    end = await lane_drained(service, lane)
    assert (end["loaded"], end["dead"], end["duplicate"]) == (loaded, dead, 0), end
    assert (await service.status())["books"]["balanced"]


@pytest.mark.parametrize("lane", REFUSES)
async def test_a_row_is_refused(service: Service, database: str, lane: str) -> None:
    harm, sqlstate = REFUSES[lane]
    await post(service, lane, 0)
    await lane_drained(service, lane)
    Postgres.execute(database, harm.format(lane=lane))
    there = len(rows(database, lane))
    await post(service, lane, *range(1, 25))
    await balanced(service, lane, loaded=24, dead=1)
    assert len(rows(database, lane)) == there + 23
    _, dead = await service.get(f"/dead?lane={lane}")
    ((letter),) = dead["letters"]
    assert letter["sqlstate"] == sqlstate, letter
    assert letter["event"]["n"] == 13
    assert (await lane_of(service, lane))["blocked"] is None
    await others_go_on(service, database)


@pytest.mark.parametrize("lane", BLOCKS)
async def test_a_lane_is_blocked_until_a_person_acts(
    service: Service, database: str, lane: str
) -> None:
    harm, words, mend = BLOCKS[lane]
    await post(service, lane, 0)
    await lane_drained(service, lane)
    Postgres.execute(database, harm.format(lane=lane))
    await post(service, lane, 1, 2)

    async def blocked() -> bool:
        return bool((await lane_of(service, lane))["blocked"])

    await until(blocked, what="a blocked lane")
    told = await lane_of(service, lane)
    assert words in told["blocked"]
    assert (told["waiting"], told["in_memory"], told["dead"]) == (2, 0, 0)
    assert any(line["lane"] == lane for line in service.logged("lane blocked"))
    await others_go_on(service, database)
    Postgres.execute(database, mend.format(lane=lane))
    await balanced(service, lane, loaded=3)
    assert rows(database, lane) == [0, 1, 2]
    assert any(line["lane"] == lane for line in service.logged("lane healed"))


async def test_a_table_of_another_type_blocks_and_dead_letters_nothing(
    service: Service, database: str
) -> None:
    """A column retyped: each row is refused, so it is the table that is wrong."""
    await post(service, "retyped", 0)
    await lane_drained(service, "retyped")
    Postgres.execute(database, "ALTER TABLE retyped ALTER t TYPE date USING NULL")
    await post(service, "retyped", *range(1, 200))

    async def blocked() -> bool:
        return "22007" in ((await lane_of(service, "retyped"))["blocked"] or "")

    await until(blocked, what="a blocked lane")
    await others_go_on(service, database)
    Postgres.execute(database, "ALTER TABLE retyped ALTER t TYPE text")
    await balanced(service, "retyped", loaded=200 - 1 + 1)
    assert rows(database, "retyped") == list(range(200))


@pytest.mark.parametrize(
    ("lane", "harm"),
    [("dropped", "DROP TABLE dropped"), ("less", "ALTER TABLE less DROP COLUMN t")],
)
async def test_what_is_missing_is_made_again(
    service: Service, database: str, lane: str, harm: str
) -> None:
    await post(service, lane, 0)
    await lane_drained(service, lane)
    Postgres.execute(database, harm)
    await post(service, lane, 1, 2, t="text")
    await balanced(service, lane, loaded=3)
    assert Postgres.execute(database, f"SELECT t FROM {lane} WHERE n = 2") == [("text",)]
    assert not any(line["lane"] == lane for line in service.logged("load failed"))


@pytest.mark.parametrize("code", [*LATER, *EVERYWHERE])
async def test_a_table_that_says_later_is_tried_again(
    service: Service, database: str, code: str
) -> None:
    lane = f"{'later' if code in LATER else 'all'}_{code.lower()}"
    await post(service, lane, 0)
    await lane_drained(service, lane)
    Postgres.execute(
        database, trigger(f"RAISE 'later' USING ERRCODE = '{code}';").format(lane=lane)
    )
    await post(service, lane, 1, 2)

    async def put_off() -> bool:
        """It holds no memory, once others could be loaded and it could not."""
        await others_go_on(service, database)
        return bool((await lane_of(service, lane))["in_memory"] == 0)

    await until(put_off, what="a lane that is put off")
    told = await lane_of(service, lane)
    assert (told["waiting"], told["dead"], told["blocked"]) == (2, 0, None)
    Postgres.execute(database, f"DROP TRIGGER t ON {lane}")
    await balanced(service, lane, loaded=3)
    assert rows(database, lane) == [0, 1, 2]


async def test_a_locked_table_waits_alone(service: Service, database: str) -> None:
    await post(service, "locked", 0)
    await lane_drained(service, "locked")
    connection = psycopg2.connect(database)
    with connection.cursor() as cursor:
        cursor.execute("LOCK TABLE locked IN ACCESS EXCLUSIVE MODE")
    await post(service, "locked", 1)

    async def failed() -> bool:
        lines = service.logged("load failed")
        return any(x["lane"] == "locked" and "lock timeout" in x["error"] for x in lines)

    await until(failed, what="a lock time-out")
    await others_go_on(service, database)
    connection.close()
    await balanced(service, "locked", loaded=2)


async def test_a_deadlock_is_tried_again(service: Service, database: str) -> None:
    """The load waits for the other session, which waits for the load: ours is ended."""
    await post(service, "deadlock", 0)
    await lane_drained(service, "deadlock")
    Postgres.execute(
        database,
        "CREATE TABLE two (n int PRIMARY KEY, x int); INSERT INTO two VALUES (1, 0), (2, 0);"
        "GRANT ALL ON two TO app;"
        + trigger(
            "UPDATE two SET x = 1 WHERE n = 2; UPDATE two SET x = 1 WHERE n = 1; RETURN NEW;"
        ).format(lane="deadlock")
        + "; ALTER FUNCTION deadlock_f() SET lock_timeout = '20s'",
    )
    other = psycopg2.connect(database)
    cursor = other.cursor()
    cursor.execute("SET deadlock_timeout = '60s'; UPDATE two SET x = 2 WHERE n = 1")
    await post(service, "deadlock", 1)

    async def ours_waits() -> bool:
        sql = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> %s"
        return bool(Postgres.execute(database, sql, other.info.backend_pid)[0][0])

    await until(ours_waits, what="a load that waits")
    await asyncio.to_thread(cursor.execute, "UPDATE two SET x = 2 WHERE n = 2")
    other.close()

    async def ended() -> bool:
        return any("deadlock" in line["error"] for line in service.logged("load failed"))

    await until(ended, what="a load that was ended")
    await balanced(service, "deadlock", loaded=2)
    assert rows(database, "deadlock") == [0, 1]


@contextmanager
def small_disk(folder: Path, megabytes: int, owner: Path) -> Iterator[Path]:
    """A file system of so many MiB; who owns `owner` owns it."""
    folder.mkdir()
    stat = owner.stat()
    options = f"size={megabytes}m,uid={stat.st_uid},gid={stat.st_gid},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.needs_root
async def test_a_full_disk_holds_up_its_own_tables_only(
    service: Service, postgres: Postgres, database: str
) -> None:
    await post(service, "crammed", 0)
    await lane_drained(service, "crammed")
    with small_disk(postgres.folder / "small", 8, postgres.data) as folder:
        Postgres.execute(database, f"CREATE TABLESPACE small LOCATION '{folder}'")
        Postgres.execute(database, "ALTER TABLE crammed SET TABLESPACE small")
        Postgres.execute(database, "CREATE TABLE ballast (t text) TABLESPACE small")
        with pytest.raises(psycopg2.errors.DiskFull):
            for _ in range(100):
                fill = "INSERT INTO ballast SELECT repeat('x', 500) FROM generate_series(1, 1000)"
                Postgres.execute(database, fill)
        await post(service, "crammed", *range(1, 2000), t="x" * 200)

        async def failed() -> bool:
            lines = service.logged("load failed")
            return any(x["lane"] == "crammed" and "No space left" in x["error"] for x in lines)

        await until(failed, what="a full disk")
        await others_go_on(service, database)
        Postgres.execute(database, "DROP TABLE ballast")
        await balanced(service, "crammed", loaded=2000)
        assert rows(database, "crammed") == list(range(2000))
        Postgres.execute(database, "DROP TABLE crammed")
        Postgres.execute(database, "DROP TABLESPACE small")


# --- the whole database ---


class Whole:
    """A server and a service that are hurt as a whole, and heal."""

    def __init__(self, postgres: Postgres, service: Service, database: str) -> None:
        self.postgres = postgres
        self.service = service
        self.database = database
        self.loaded = 0

    def admin(self, sql: str) -> None:
        self.postgres.execute(self.postgres.url("postgres"), sql)

    def end_connections(self) -> None:
        self.admin(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{self.name}' AND pid <> pg_backend_pid()"
        )

    @property
    def name(self) -> str:
        return self.database.rpartition("/")[2]

    async def post(self) -> None:
        """An event in each of two lanes."""
        self.loaded += 1
        await post(self.service, "one", self.loaded)
        await post(self.service, "two", self.loaded)

    async def is_down(self, why: str) -> None:
        async def told() -> bool:
            state = (await self.service.status())["database"]
            return state["up"] is False and why in (state["error"] or "")

        await until(told, what=f"a database that is down: {why}")
        status = await self.service.status()
        assert status["books"]["waiting"] >= 2
        assert all(lane["blocked"] is None for lane in status["lanes"].values())

    async def heals(self) -> None:
        books = await self.service.drained(40)
        assert books["balanced"]
        assert (books["dead"], books["duplicate"]) == (0, 0), books
        assert (await self.service.status())["database"]["up"]


@pytest.fixture(scope="module")
def hurt() -> Iterator[Postgres]:
    with Postgres.running() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def whole(tmp_path: Path, hurt: Postgres) -> AsyncIterator[Whole]:
    database = hurt.create_database()
    async with running(
        tmp_path, database_url=as_app(hurt, database), events={"one": FIELDS, "two": FIELDS},
        load_interval=0.3,
    ) as service:  # fmt: skip
        made = Whole(hurt, service, database)
        await made.post()
        await made.heals()
        yield made


async def is_complete(whole: Whole) -> None:
    await whole.heals()
    for lane in ("one", "two"):
        assert rows(whole.database, lane) == list(range(1, whole.loaded + 1))


async def test_connections_are_lost(whole: Whole) -> None:
    for _ in range(5):
        whole.end_connections()
        await whole.post()
    await is_complete(whole)


@pytest.mark.parametrize(
    ("harm", "mend", "why"),
    [
        (
            "ALTER DATABASE {name} SET default_transaction_read_only = on",
            "ALTER DATABASE {name} RESET default_transaction_read_only",
            "read-only transaction",
        ),
        (
            "ALTER DATABASE {name} CONNECTION LIMIT 0",
            "ALTER DATABASE {name} CONNECTION LIMIT -1",
            "too many connections",
        ),
        ("ALTER ROLE app NOLOGIN", "ALTER ROLE app LOGIN", "not permitted to log in"),
        (
            "ALTER DATABASE {name} ALLOW_CONNECTIONS false",
            "ALTER DATABASE {name} ALLOW_CONNECTIONS true",
            "not currently accepting connections",
        ),
        (
            "ALTER DATABASE {name} RENAME TO {name}_gone",
            "ALTER DATABASE {name}_gone RENAME TO {name}",
            "does not exist",
        ),
    ],
    ids=["read_only", "too_many_connections", "no_login", "closed", "renamed"],
)
async def test_the_database_takes_nothing_for_a_while(
    whole: Whole, harm: str, mend: str, why: str
) -> None:
    def hurt() -> None:
        if "RENAME" in harm:
            whole.admin(f"ALTER DATABASE {whole.name} ALLOW_CONNECTIONS false")
            whole.end_connections()
            whole.admin(harm.format(name=whole.name))
            whole.admin(f"ALTER DATABASE {whole.name}_gone ALLOW_CONNECTIONS true")
        else:
            whole.admin(harm.format(name=whole.name))
            whole.end_connections()

    hurt()
    await whole.post()
    await whole.is_down(why)
    await whole.post()
    whole.admin(mend.format(name=whole.name))
    if "read_only" in harm:
        whole.end_connections()
    await is_complete(whole)
    assert whole.service.logged("database down")
    assert whole.service.logged("database up")


async def test_the_database_is_dropped_and_made_anew(whole: Whole) -> None:
    """What waited is loaded; what was loaded is gone with it."""
    whole.admin(f"DROP DATABASE {whole.name} WITH (FORCE)")
    await whole.post()
    await whole.is_down("does not exist")
    whole.admin(f"CREATE DATABASE {whole.name}")
    as_app(whole.postgres, whole.database)
    await whole.heals()
    assert rows(whole.database, "one") == rows(whole.database, "two") == [2]


async def test_the_schema_is_dropped(whole: Whole) -> None:
    Postgres.execute(whole.database, "DROP SCHEMA public CASCADE")
    Postgres.execute(whole.database, "CREATE SCHEMA public; GRANT ALL ON SCHEMA public TO app")
    await whole.post()
    await whole.heals()
    assert rows(whole.database, "one") == rows(whole.database, "two") == [2]


async def test_the_server_restarts(whole: Whole) -> None:
    whole.postgres.stop()
    await whole.post()
    await whole.is_down("")
    await asyncio.to_thread(whole.postgres.start)
    await is_complete(whole)


async def test_the_table_of_policies_is_told_in_full() -> None:
    """Each verdict of the code has its test here: a new one must come with its own."""
    from datapipe.sinks.verdict import Verdict

    assert {verdict.name for verdict in Verdict} == {"DOWN", "LATER", "MISSING", "BLOCKED", "ROW"}
