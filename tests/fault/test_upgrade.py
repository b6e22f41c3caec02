"""Release 1.0, as it is in git, and this one: each loads what the other accepted and died with.

One data_dir or queue, one database. Every kind of value; rows that the table refuses are dead
letters, which both put back; the time zone of the database is not UTC.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.fault.ironmq_process import running_queue
from tests.postgres import Postgres
from tests.service import ROOT, Service, until

RELEASE = "3f393d1"  # 1.0
KEYED = {"headers": {"Idempotency-Key": "once"}}

KINDS = {
    "ratio": "float", "text": "str", "flag": "bool", "at": "datetime", "day": "date",
    "price": "Decimal", "key": "UUID", "properties": "dict", "tags": "list",
}  # fmt: skip
MAYBE = {f"maybe_{name}": f"{kind}?" for name, kind in {"n": "int", **KINDS}.items()}
EVENTS = {"everything": {"n": "int", **KINDS, **MAYBE}}
TIMES = {  # as it is sent, and as PostgreSQL shows it in UTC
    "2026-11-25T12:00:00.123456+02:30": "2026-11-25T09:30:00.123456+00:00",
    "2026-11-25T20:00:00-08:00": "2026-11-26T04:00:00+00:00",
    "2026-11-25T12:00:00": "2026-11-25T12:00:00+00:00",
    "2026-11-25T12:00:00Z": "2026-11-25T12:00:00+00:00",
    "0001-01-01T00:00:00+02:30": "0001-12-31T21:30:00+00:00 BC",
    "9999-12-31T23:59:59.5-08:00": "10000-01-01T07:59:59.5+00:00",
}
# the first as each release writes it: a dead letter of this one in 1.0, and the other way round
SHOWN = {"new": "2026-11-25 09:30:00.123456", "1.0": "2026-11-25 12:00:00.123456+02:30"}
TEXTS = ["plain", "tab\t newline\n return\r \\N \\", "it's", "", "\u20ac \U0001f600", "\\t"]
PRICES = ["19.990", "-0.5", "0", "123456789012345678901234567890", "1.10", "7"]
WITH_ALL = [
    {
        "ratio": [0.1, -2.5e-8, 5e-324][i % 3], "text": TEXTS[i], "flag": i % 2 == 0, "at": at,
        "day": ["2024-02-29", "0001-01-01", "9999-12-31"][i % 3], "price": PRICES[i],
        "key": f"00000000-0000-4000-8000-{i:012}",
        "properties": {"a\t": [1, None, {"b": TEXTS[i]}]}, "tags": [[], {}, TEXTS[i], True, 1.5],
    }
    for i, at in enumerate(TIMES)
]  # fmt: skip


def events(start: int) -> list[dict[str, Any]]:
    """One of each time; what may be null is not in every second one, but is in the others."""
    made = []
    for n, values in enumerate(WITH_ALL, start):
        event = {"event_name": "everything", "n": n, **values}
        given = {f"maybe_{name}": value for name, value in {"n": n, **values}.items()}
        made.append(event | (given if n % 2 else dict.fromkeys(given)))
    return made


def plain(n: int) -> dict[str, Any]:
    """An event in whose JSON nothing is escaped."""
    return {"event_name": "everything", **WITH_ALL[0], "n": n, "properties": {"a": 1}}


def whole(event: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(MAYBE) | event


def stored(event: dict[str, Any]) -> dict[str, Any]:
    """The row of an event, as `rows` shows it."""
    row = whole(event)
    del row["event_name"]
    for name in ("at", "maybe_at"):
        row[name] = row[name] and TIMES[row[name]]
    return row


def rows(database: str) -> list[dict[str, Any]]:
    sql = (
        "SET timezone = 'UTC'; SELECT to_jsonb(e) || jsonb_build_object("
        "'price', price::text, 'maybe_price', maybe_price::text) FROM everything e ORDER BY n"
    )
    found = [row for (row,) in Postgres.execute(database, sql)]
    for row in found:
        received = datetime.fromisoformat(row.pop("received_at"))
        assert timedelta(0) < datetime.now(UTC) - received < timedelta(minutes=5)
    return found


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout of release 1.0."""
    folder = tmp_path_factory.mktemp("release")
    archive = subprocess.run(
        ["git", "-c", "safe.directory=*", "archive", RELEASE], cwd=ROOT, capture_output=True
    )
    assert archive.returncode == 0, (
        f"release 1.0 (commit {RELEASE}) can't be had from git; in a shallow clone"
        f" `git fetch --unshallow` helps: {archive.stderr.decode()}"
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


@pytest.fixture(params=["journal", "ironmq"])
async def make(
    request: pytest.FixtureRequest,
    make_service: Callable[..., Service],
    database: str,
    release: Path,
) -> AsyncIterator[Callable[..., Service]]:
    """Makes services of either release over one mirror and one database."""
    name = database.rpartition("/")[2]
    Postgres.execute(database, f"ALTER DATABASE {name} SET timezone = 'America/Caracas'")
    async with AsyncExitStack() as stack:
        mirror: dict[str, Any] = {"mirror": "journal"}
        if request.param == "ironmq":
            mirror = (await stack.enter_async_context(running_queue())).settings
            mirror["event_modules"] = ["tests.fault.modules.quick_watch"]

        def made(version: str, **settings: Any) -> Service:
            return make_service(
                env=running(version, release), database_url=database, events=EVENTS, **mirror,
                **settings,
            )  # fmt: skip

        yield made


def running(version: str, release: Path) -> dict[str, str]:
    """The variables by which a service is of that version."""
    return {"PYTHONPATH": str({"1.0": release, "new": ROOT}[version])}


@pytest.mark.parametrize(("accepting", "loading"), [("new", "1.0"), ("1.0", "new")])
async def test_each_release_loads_what_the_other_left(
    make: Callable[..., Service], database: str, accepting: str, loading: str
) -> None:
    first = await make(accepting, load_interval=3600).start()
    assert (await first.post(plain(-1)))[0] == 200
    assert await first.load() == {"loaded": {"everything": 1}, "failed": {}}
    Postgres.execute(database, "ALTER TABLE everything ADD CONSTRAINT few CHECK (n < 100)")
    keyed = json.dumps([*events(0), *events(200)], indent="\t")  # so within `dict` and `list`
    for body in (plain(6), json.dumps(events(100), ensure_ascii=False), plain(106)):
        assert (await first.post(body))[0] == 200
    assert (await first.post(keyed, **KEYED))[0] == 200
    await first.kill()
    good = [plain(-1), *events(0), plain(6)]
    refused = [*events(100), plain(106), *events(200)]

    second = await make(loading).start()

    async def loaded() -> bool:
        sql = "SELECT (SELECT count(*) FROM everything), count(*) FROM datapipe_dead_letters"
        return Postgres.execute(database, sql) == [(len(good), len(refused))]

    await until(loaded, what="a load of what the other release left")
    assert rows(database) == [stored(event) for event in good]

    letters = (await second.get("/dead?limit=1000"))[1]["letters"]
    shown = {letter["event"]["n"]: letter["event"] for letter in letters}
    assert shown[100]["at"] == SHOWN[accepting]
    for event in refused:
        letter, sent = shown[event["n"]], whole(event)
        times = [letter.pop("received_at")]
        for name in ("at", "maybe_at"):
            del sent[name]
            times.append(letter.pop(name))
        assert letter == sent
        if loading == "new":
            assert all(time is None or re.search(r"[+-]\d\d:\d\d$", time) for time in times)

    Postgres.execute(database, "ALTER TABLE everything DROP CONSTRAINT few")
    ids = [letter["id"] for letter in letters if letter["event"]["n"] < 200]  # and later the rest
    await replay(second, {"ids": ids}, 7)
    assert await second.stop() == 0
    third = await make(accepting).start()
    await replay(third, {"all": True}, 6)
    assert rows(database) == [stored(event) for event in (*good, *refused)]

    assert (await third.post(keyed, **KEYED))[0] == 200
    await third.drained()
    assert len(rows(database)) == len(good) + len(refused)


async def replay(service: Service, selection: dict[str, Any], count: int) -> None:
    async with service.session.post(f"{service.url}/dead/replay", json=selection) as answer:
        assert await answer.json() == {"replayed": {"everything": count}, "dead": 0}


async def test_processes_of_both_releases_share_a_data_dir(
    make_service: Callable[..., Service], database: str, release: Path
) -> None:
    """A rolling upgrade and the way back, with a kill on each."""
    late = {"load_interval": 3600, "load_min_interval": 0}

    async def started(version: str, **settings: Any) -> Service:
        env = running(version, release)
        return await make_service(env=env, database_url=database, **settings).start()

    gone, old = await started("1.0", **late), await started("1.0", **late)
    await accepted(gone, 1, 200)
    await gone.kill()
    new = await started("new", **late)
    await sees_rows(database, 200)  # what a killed one left is loaded at the next start

    await accepted(old, 201, 300)
    await accepted(new, 301, 400)
    await accepted(new, 201, 300)  # sent again, to a process of the other release
    await accepted(old, 301, 400)
    for asked in (old, new):
        status = await asked.status()
        assert (status["processes"], status["books"]["waiting"]) == (2, 400)
        assert status["books"]["balanced"]
        assert "datapipe_events_accepted_total" in await text(asked, "/metrics")
    assert await new.load() == {"loaded": {"install": 200}, "failed": {}}  # it asks the other, too
    await sees_rows(database, 400)

    await accepted(new, 401, 500)
    assert await old.stop() == 0
    await new.kill()
    again = await started("1.0")
    await sees_rows(database, 500)
    await accepted(again, 401, 500)
    await again.drained()
    await sees_rows(database, 500)
    ids = Postgres.execute(database, "SELECT user_id FROM install ORDER BY user_id")
    assert [id for (id,) in ids] == [*range(1, 501)]


async def accepted(service: Service, first: int, last: int) -> None:
    """POST events with these ids, under a key that is theirs."""
    body = [{"event_name": "install", "user_id": n, "timestamp": n} for n in range(first, last + 1)]
    status, answer = await service.post(body, headers={"Idempotency-Key": f"{first}-{last}"})
    assert (status, answer["accepted"]) == (200, len(body))


async def sees_rows(database: str, count: int) -> None:
    async def there() -> bool:
        made = "SELECT to_regclass('install') IS NOT NULL"
        (exists,) = Postgres.execute(database, made)[0]
        return exists and Postgres.execute(database, "SELECT count(*) FROM install") == [(count,)]

    await until(there, what=f"{count} rows")


async def text(service: Service, path: str) -> str:
    async with service.session.get(f"{service.url}{path}") as answer:
        assert answer.status == 200
        return await answer.text()
