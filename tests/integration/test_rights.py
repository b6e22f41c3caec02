"""What a role needs: the rights that docs/databases.md names are enough, and each that is lacking
is named with its GRANT, at once and without filling the server's log.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read
from tests.integration.test_commands import Run, datapipe
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import crash, purchase

__all__ = ["datapipe"]

OWN = ("datapipe_ledger", "datapipe_dead_letters", "datapipe_processes")


@pytest.fixture
def role(database: str) -> str:
    """A name of its own: roles are of the whole server."""
    return f"role_{database[-8:]}"


def page_grants(database: str, named: str, role: str) -> None:
    """Run the block of the page that makes that role, under our name."""
    blocks = [block.text for block in read(ROOT / "docs/databases.md").blocks]
    (found,) = (text for text in blocks if f"CREATE ROLE {named} " in text)
    Postgres.execute(database, re.sub(rf"\b{named}\b", role, found))


def as_role(database: str, role: str) -> str:
    return database.replace("postgres@", f"{role}@")


async def works(service: Service, database: str) -> None:
    """Events and keys are loaded, refused rows are dead letters that can be replayed."""
    for _ in range(2):
        await service.post(crash("x", 1), headers={"Idempotency-Key": "k"})
    await service.post([purchase("s", 2)])
    books = await service.drained()
    assert (books["loaded"], books["duplicate"], books["dead"]) == (2, 1, 0)
    harm = "ALTER TABLE crash_report ADD CONSTRAINT even CHECK (user_id % 2 = 0) NOT VALID"
    Postgres.execute(database, harm)
    await service.post([crash("x", 3), crash("x", 4)])
    assert (await service.drained())["dead"] == 1
    Postgres.execute(database, "ALTER TABLE crash_report DROP CONSTRAINT even")
    async with service.session.post(f"{service.url}/dead/replay", json={"all": True}) as response:
        assert await response.json() == {"replayed": {"crash_report": 1}, "dead": 0}
    rows = "SELECT user_id FROM crash_report ORDER BY 1"
    assert Postgres.execute(database, rows) == [(1,), (3,), (4,)]
    status = await service.status()
    assert status["database"]["up"]
    assert [part for part in status["parts"] if part["up"] is False] == []
    assert await service.stop() == 0
    assert Postgres.execute(database, "SELECT ended FROM datapipe_processes") == [(True,)]


async def test_a_role_that_makes_its_tables(
    make_service: Callable[..., Service], datapipe: Run, database: str, role: str
) -> None:
    Postgres.execute(database, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    page_grants(database, "collector", role)
    checked = await datapipe("check", database_url=as_role(database, role))
    assert (checked.code, "fail" in checked.out) == (0, False), checked
    await works(await make_service(database_url=as_role(database, role)).start(), database)


async def test_a_role_that_owns_nothing(
    make_service: Callable[..., Service], datapipe: Run, database: str, role: str
) -> None:
    Postgres.execute(database, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    applied = await datapipe("schema", "--apply", database_url=database)
    assert (applied.code, applied.err) == (0, "")
    assert applied.out.count("CREATE TABLE") == 6
    again = await datapipe("schema", "--apply", database_url=database)
    assert (again.code, again.out) == (0, "nothing is missing\n")
    page_grants(database, "loader", role)
    checked = await datapipe("check", database_url=as_role(database, role))
    assert (checked.code, "fail" in checked.out) == (0, False), checked
    await works(await make_service(database_url=as_role(database, role)).start(), database)


async def test_each_right_that_is_lacking_is_named_with_its_grant(
    datapipe: Run, database: str, role: str
) -> None:
    """From no right at all, whatever the check says is run, until it is content."""
    Postgres.execute(database, f"REVOKE ALL ON SCHEMA public FROM PUBLIC; CREATE ROLE {role} LOGIN")
    applied = await datapipe("schema", "--apply", database_url=database)
    assert applied.code == 0
    checked = await datapipe("check", database_url=as_role(database, role))
    assert checked.code == 1
    fails = re.findall(r"^fail  table (\w+): .*?: (GRANT .*)$", checked.out, re.MULTILINE)
    assert [table for table, _ in fails] == [*OWN, "crash_report", "install", "purchase"]
    for _, grants in fails:
        Postgres.execute(database, grants)
    assert (await datapipe("check", database_url=as_role(database, role))).code == 0
    columns = "user_id, timestamp, message, received_at"
    for given, code in ((columns, 0), ("user_id, received_at", 1)):
        Postgres.execute(database, f"REVOKE INSERT ON crash_report FROM {role}")
        Postgres.execute(database, f"GRANT INSERT ({given}) ON crash_report TO {role}")
        assert (await datapipe("check", database_url=as_role(database, role))).code == code
        Postgres.execute(database, f"REVOKE INSERT ({given}) ON crash_report FROM {role}")


async def test_a_new_key_is_its_owners_to_add(datapipe: Run, database: str, role: str) -> None:
    assert (await datapipe("schema", "--apply", database_url=database)).code == 0
    page_grants(database, "loader", role)
    events = {
        "install": {
            "user_id": "int",
            "timestamp": "int",
            "device": 'str = "pc"',
        }
    }
    for command in (["check"], ["schema", "--apply"]):
        refused = await datapipe(*command, database_url=as_role(database, role), events=events)
        assert refused.code == 1
        said = re.search(
            r"only its owner may add .*: (ALTER TABLE .*)$", refused.out + refused.err, re.M
        )
        assert said, refused
    Postgres.execute(database, said[1])
    assert (await datapipe("check", database_url=as_role(database, role), events=events)).code == 0


async def test_apply_leaves_the_tables_of_others_alone(datapipe: Run, database: str) -> None:
    Postgres.execute(database, "CREATE TABLE install (machine text)")
    applied = await datapipe("schema", "--apply", database_url=database)
    assert applied.code == 1
    assert "install: has no column received_at" in applied.one_line()
    assert applied.out.count("CREATE TABLE") == 5
    away = await datapipe("schema", "--apply", database_url="postgresql://127.0.0.1:1/x")
    assert (away.code, away.out) == (1, "")
    assert away.one_line()


async def test_what_is_lacking_is_said_at_once_and_fills_no_log(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    """A role without any right; then with those of the page, and one that is revoked."""
    options = {"logging_collector": "on", "log_directory": "log", "log_filename": "server.log"}
    with Postgres.running(**options) as server:
        url = server.create_database()
        log = server.data / "log/server.log"
        server.execute(url, "REVOKE ALL ON SCHEMA public FROM PUBLIC; CREATE ROLE loader LOGIN")
        before = log.stat().st_size

        def errors() -> list[str]:
            return re.findall(r"ERROR: .*", log.read_bytes()[before:].decode())

        service = await make_service(
            database_url=url.replace("postgres@", "loader@"), load_interval=0.2
        ).start()
        await service.post(crash("x", 1))

        async def refused() -> bool:
            return bool((await service.status())["database"]["refuses"])

        await until(refused, what="a reason")
        grants = 'GRANT CREATE ON SCHEMA "public" TO "loader"; GRANT USAGE ON SCHEMA'
        status = await service.status()
        assert not status["database"]["up"]
        assert grants in status["database"]["error"]
        assert status["lanes"]["crash_report"]["blocked"] is None  # all are, and it is said once
        assert status["summary"]["text"].startswith("PostgreSQL refuses us (since ")
        assert grants in status["summary"]["text"]
        assert status["summary"]["also"] == []
        (line,) = service.logged("database down")
        assert grants in line["error"]
        await asyncio.sleep(2)  # some ten tries
        assert errors() == []

        server.execute(url, "GRANT USAGE, CREATE ON SCHEMA public TO loader")
        assert (await service.drained())["loaded"] == 1
        assert not (await service.status())["database"]["refuses"]

        async def blocked() -> bool:
            return "GRANT" in ((await service.status())["lanes"]["crash_report"]["blocked"] or "")

        server.execute(url, "ALTER TABLE crash_report OWNER TO postgres")
        await service.post(crash("x", 2))
        await until(blocked, what="a reason")
        await asyncio.sleep(2)
        assert len(errors()) == 1
        server.execute(url, "GRANT INSERT ON crash_report TO loader")
        assert (await service.drained())["loaded"] == 2
