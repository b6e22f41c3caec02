"""Dead letters: one bad row costs one row; looked at, put back, removed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.commands import command
from tests.postgres import Postgres
from tests.service import Service, until

Make = Callable[..., Service]


def install(user: int) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user, "timestamp": 1}


@pytest.fixture
async def service(make_service: Make, database: str, postgres: Postgres) -> Service:
    """A service whose table `install` refuses odd users below 1000."""
    made = await make_service(database_url=database).start()
    await made.post(install(0))
    await made.drained()
    postgres.execute(
        database,
        "ALTER TABLE install ADD CONSTRAINT even CHECK (user_id % 2 = 0 OR user_id >= 1000)",
    )
    return made


async def test_a_refused_row_costs_itself_only(
    service: Service, postgres: Postgres, database: str
) -> None:
    await service.post([install(user) for user in (2, 3, 4, 5, 6)])
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (4, 2, True)
    users = postgres.execute(database, "SELECT user_id FROM install ORDER BY 1")
    assert users == [(0,), (2,), (4,), (6,)]
    _, found = await service.get("/dead")
    assert found["total"] == 2
    assert [(g["lane"], g["sqlstate"], g["count"]) for g in found["groups"]] == [
        ("install", "23514", 2)
    ]
    letter = found["letters"][0]
    assert letter["event"].items() >= install(5).items()
    assert letter["event"]["received_at"].endswith("+00:00")
    assert "even" in letter["message"]
    (line,) = service.logged("rows refused")
    assert (line["rows"], line["error"].count("even")) == (2, 1)  # a reason is said once


async def counted(service: Service) -> tuple[str, int]:
    """The state, and the gauge of the lane."""
    async with service.session.get(f"{service.url}/metrics") as response:
        found = re.search(
            r'^datapipe_dead_letters\{lane="install"\} (\S+)', await response.text(), re.MULTILINE
        )
    state = (await service.status())["summary"]["state"]
    return state, int(float(found[1])) if found else -1


async def test_they_are_a_state_of_their_own_as_long_as_they_lie_there(
    service: Service, make_service: Make, database: str, postgres: Postgres
) -> None:
    async def becomes(state: str, count: int, which: Service = service) -> None:
        async def is_so() -> bool:
            return await counted(which) == (state, count)

        await until(is_so, what=f"{state}, {count}")

    await becomes("healthy", 0)
    await service.post([install(3), install(5), install(6)])
    await service.drained()
    await becomes("dead_letters", 2)
    text = (await service.status())["summary"]["text"]
    assert text.startswith("2 events are dead letters (install 2), since ")
    _, said = await command(service.file, "status", service.url)
    assert text in said
    other = await make_service(database_url=database, data_dir="other").start()
    await becomes("dead_letters", 2, other)  # though it has refused none
    postgres.execute(database, "ALTER TABLE install DROP CONSTRAINT even")
    form = {"lane": "install", "sqlstate": "23514"}
    async with service.session.post(f"{service.url}/dead/replay", data=form) as answer:
        assert answer.status == 200
    await becomes("healthy", 0)


async def test_replayed_when_the_table_takes_them_again(
    service: Service, postgres: Postgres, database: str
) -> None:
    await service.post([install(3), install(5)])
    await service.drained()
    before = postgres.execute(
        database, "SELECT event->>'received_at' FROM datapipe_dead_letters ORDER BY id"
    )
    async with service.session.post(f"{service.url}/dead/replay", json={"all": True}) as answer:
        assert await answer.json() == {"replayed": {"install": 0}, "dead": 2}
    postgres.execute(database, "ALTER TABLE install DROP CONSTRAINT even")
    body = {"lane": "install", "sqlstate": "23514"}
    async with service.session.post(f"{service.url}/dead/replay", json=body) as answer:
        assert await answer.json() == {"replayed": {"install": 2}, "dead": 0}
    assert (await service.get("/dead"))[1]["total"] == 0
    rows = postgres.execute(
        database,
        "SELECT user_id, to_json(received_at) #>> '{}' FROM install WHERE user_id > 0 ORDER BY 1",
    )
    assert [user for user, _ in rows] == [3, 5]
    assert len(before) == 2
    lane = (await service.status())["lanes"]["install"]
    assert (lane["replayed"], lane["dead"], lane["loaded"]) == (2, 2, 1)


async def test_dropped_by_id_and_all(service: Service) -> None:
    await service.post([install(3), install(5), install(7)])
    await service.drained()
    ids = [letter["id"] for letter in (await service.get("/dead"))[1]["letters"]]
    for body, dropped in (({"ids": ids[:1]}, 1), ({"ids": ids[:1]}, 0)):
        async with service.session.post(f"{service.url}/dead/drop", json=body) as answer:
            assert await answer.json() == {"dropped": dropped}
    as_curl_says = {"Content-Type": "application/x-www-form-urlencoded"}
    async with service.session.post(
        f"{service.url}/dead/drop", data=' {"all": true}', headers=as_curl_says
    ) as answer:
        assert await answer.json() == {"dropped": 2}


@pytest.mark.parametrize("body", ["{}", "[]", '{"all": false}', '{"ids": ["1"]}', '{"x": 1}', "{"])
async def test_nothing_is_meant_by_accident(service: Service, body: str) -> None:
    for path in ("/dead/replay", "/dead/drop"):
        async with service.session.post(f"{service.url}{path}", data=body) as answer:
            assert answer.status == 400
            assert set(await answer.json()) == {"status_code", "status_message"}


async def test_the_command(service: Service, postgres: Postgres, database: str) -> None:
    await service.post([install(3), install(5)])
    await service.drained()
    code, text = await command(service.file, "dead", "list", "--type", "install")
    assert code == 0
    assert "total: 2" in text
    assert '"user_id": 5' in text
    assert (await command(service.file, "dead", "drop"))[0] == 2
    assert (await command(service.file, "dead", "replay", "--all"))[0] == 1
    postgres.execute(database, "ALTER TABLE install DROP CONSTRAINT even")
    code, text = await command(service.file, "dead", "replay", "--sqlstate", "23514")
    assert (code, "replayed install: 2 rows" in text) == (0, True)
    code, text = await command(service.file, "dead", "drop", "--all")
    assert (code, text) == (0, "dropped: 0\n")


async def test_a_schema_with_percent_signs(
    postgres: Postgres, database: str, make_service: Callable[..., Service]
) -> None:
    """What psycopg2 takes for a placeholder, in every statement: load, key, letters, heartbeat."""
    schema = "100% of %s"
    modules = ["tests.fault.modules.quick_watch", "tests.fault.modules.quick_recovery"]
    settings = {"database_url": database, "database_schema": schema, "event_modules": modules}
    service = await make_service(**settings).start()
    await service.post(install(0))
    await service.drained()
    postgres.execute(
        database, f'ALTER TABLE "{schema}".install ADD CONSTRAINT even CHECK (user_id % 2 = 0)'
    )
    for _ in range(2):
        assert (await service.post(install(2), headers={"Idempotency-Key": "once"}))[0] == 200
    await service.post([install(3), install(5)])
    books = await service.drained()
    assert (books["loaded"], books["duplicate"], books["dead"]) == (2, 1, 2)
    (one, other) = (await service.get("/dead?lane=install&sqlstate=23514"))[1]["letters"]
    for body, dropped in (({"ids": [one["id"]]}, 1), ({"lane": "purchase"}, 0)):
        async with service.session.post(f"{service.url}/dead/drop", json=body) as answer:
            assert await answer.json() == {"dropped": dropped}
    async with service.session.post(f"{service.url}/dead/replay", json={"all": True}) as answer:
        assert await answer.json() == {"replayed": {"install": 0}, "dead": 1}
    assert (await service.get("/dead"))[1]["letters"][0]["id"] == other["id"]

    neighbour = await make_service(**settings, load_interval=3600).start()
    await neighbour.post(install(4))
    await neighbour.kill()

    async def taken_over() -> bool:
        rows = await postgres.aexecute(
            database,
            f'SELECT (SELECT count(*) FROM "{schema}".install), count(*), min(beats) > 2'
            f' FROM "{schema}".datapipe_processes',
        )
        return bool(rows == [(3, 1, True)])

    await until(taken_over, what="the neighbour's event, and its heartbeat gone")
    assert not service.logged("heartbeat failed")
    assert not service.logged("lane blocked")
    assert await service.stop() == 0


async def test_a_table_that_refuses_nearly_all_blocks_its_lane_and_heals(
    service: Service, postgres: Postgres, database: str
) -> None:
    await service.post([install(2 * n + 1) for n in range(150)])
    answer = await service.load("?lane=install")
    assert answer["loaded"] == {}
    assert answer["failed"]["install"].startswith("blocked: the table refuses 150 of 150 rows")
    lane = (await service.status())["lanes"]["install"]
    assert "accept=dead" in lane["blocked"]
    assert (lane["waiting"], lane["in_memory"], lane["dead"]) == (150, 0, 0)
    await service.post({"event_name": "purchase", "user_id": 1, "timestamp": 1, "sku": "s"})
    await service.load()
    assert (await service.status())["lanes"]["purchase"]["loaded"] == 1
    postgres.execute(database, "ALTER TABLE install DROP CONSTRAINT even")
    books = await service.drained()
    assert (books["loaded"], books["dead"]) == (152, 0)
    assert service.logged("lane healed")
    assert (await service.status())["lanes"]["install"]["blocked"] is None


async def test_accept_dead_lets_them_through(service: Service) -> None:
    await service.post([install(2 * n + 1) for n in range(150)])
    assert (await service.load())["loaded"] == {}
    assert await service.load("?lane=install&accept=dead") == {"loaded": {}, "failed": {}}
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (1, 150, True)


async def test_json_that_jsonb_refuses_costs_itself_only(
    make_service: Make, postgres: Postgres, database: str
) -> None:
    doc = '{"event_name": "doc", "d": {"n": %s}}'
    service = await make_service(database_url=database, events={"doc": {"d": "dict"}}).start()
    await service.post("[" + ", ".join(doc % n for n in ("1", "1e-20000", "2")) + "]")
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (2, 1, True)
    letter = (await service.get("/dead"))[1]["letters"][0]
    assert letter["event"]["d"] == {"n": 0.0}  # 1e-20000, too small for Python as well
    assert (letter["sqlstate"], letter["column_name"]) == ("22003", "d")


async def test_the_page_shows_them_escaped_and_its_buttons_act(
    service: Service, postgres: Postgres, database: str
) -> None:
    script = {"event_name": "crash_report", "user_id": -1, "timestamp": 1, "message": "<script>x"}
    await service.post({**script, "user_id": 1})
    await service.drained()
    postgres.execute(database, "ALTER TABLE crash_report ADD CHECK (user_id > 0)")
    await service.post([install(3), install(5), script])
    await service.drained()
    async with service.session.get(f"{service.url}/") as answer:
        page = await answer.text()
    assert "Dead letters" in page
    assert "&lt;script&gt;x" in page
    assert "<script>x" not in page
    asked, form = page.split("Drop for good…</summary>")[1].split("</form>")[0].split("<form")
    assert "2 events can't be had again then." in asked
    assert 'action="dead/drop"' in form
    assert page.count('action="dead/drop"') == page.count('<details class="ask">') == 2
    postgres.execute(database, "ALTER TABLE install DROP CONSTRAINT even")
    form = {"lane": "install", "sqlstate": "23514"}
    url = f"{service.url}/dead/replay"
    async with service.session.post(url, data=form, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (303, "../#dead")
    assert (await service.get("/dead"))[1]["total"] == 1
    elsewhere = {"Origin": "http://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    async with service.session.post(url, data=form, headers=elsewhere) as answer:
        assert answer.status == 403
