"""Events of unknown types: kept as they were sent, named later, moved, dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import datapipe.testing
from datapipe.cli.main import main
from datapipe.events.segment import Segment
from datapipe.events.unknown import UnknownType
from datapipe.settings import Settings
from datapipe.sinks import open_sink, table_of
from tests.postgres import Postgres
from tests.service import Service, until

Make = Callable[..., Service]

# as it was sent: white space, digits, escapes, a key twice, beyond ASCII
SENT = '{ "event_name":"brand_new","user_id" : 7,\n\t"n": 1.50, "t": "\\u00e9é\\\\n", "n": 2 }'


def names(found: dict[str, Any]) -> dict[str, int]:
    return {group["event_name"]: group["count"] for group in found["groups"]}


def sized(length: int) -> str:
    """An event of so many bytes."""
    event = '{"event_name": "new", "t": "%s"}'
    return event % ("x" * (length - len(event % "")))


async def admin(service: Service, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with service.session.post(f"{service.url}{path}", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def test_kept_as_sent_and_moved_once_its_type_is_registered(
    make_service: Make, database: str, postgres: Postgres
) -> None:
    first = await make_service(database_url=database, unknown_events="keep").start()
    assert await first.post(SENT) == (200, {"status_code": 0, "status_message": "ok"})
    _, answer = await first.post(
        [
            {"event_name": "brand_new", "user_id": 8},
            {"event_name": "install", "user_id": 9, "timestamp": 1},
            {"event_name": "brand_new", "user_id": "nine"},
            {"event_name": "other"},
        ]
    )
    assert (answer["accepted"], answer["rejected"]) == (4, 0)
    books = await first.drained()
    assert (books["loaded"], books["balanced"]) == (5, True)
    rows = postgres.execute(
        database, "SELECT event_name, event::text, received_at FROM datapipe_unknown ORDER BY id"
    )
    assert rows[0][:2] == ("brand_new", SENT)
    assert [name for name, *_ in rows] == ["brand_new", "brand_new", "brand_new", "other"]
    _, found = await first.get("/unknown?limit=1")
    assert (found["total"], names(found)) == (4, {"brand_new": 3, "other": 1})
    assert [letter["event"] for letter in found["letters"]] == [{"event_name": "other"}]
    assert found["groups"][1]["events"] == {"other": {}}
    lane = (await first.status())["lanes"]["datapipe_unknown"]
    assert (lane["accepted"], lane["loaded"]) == (4, 4)
    assert await first.stop() == 0

    fields = {"user_id": "int", "t": "str?", "n": "float?"}
    second = await make_service(database_url=database, events={"brand_new": fields}).start()
    assert "datapipe_unknown" not in (await second.status())["lanes"]
    answer = await admin(second, "/unknown/replay", {"all": True})
    assert answer == {"replayed": {"brand_new": 2}, "refused": 1, "unknown": 2}
    moved = postgres.execute(
        database, "SELECT user_id, t, n, received_at FROM brand_new ORDER BY user_id"
    )
    assert moved == [(7, "éé\\n", 2.0, rows[0][2]), (8, None, None, rows[1][2])]
    _, found = await second.get("/unknown?event_name=brand_new")
    (group,), (letter,) = found["groups"], found["letters"]
    assert (group["registered"], group["refused"], group["events"]) == (True, 1, None)
    assert "user_id: must be int (64 bits): " in letter["message"]
    assert (await second.status())["lanes"]["brand_new"]["replayed"] == 2
    again = await admin(second, "/unknown/replay", {"event_name": "brand_new"})
    assert again == {"replayed": {}, "refused": 1, "unknown": 1}
    assert await admin(second, "/unknown/drop", {"ids": [letter["id"]]}) == {"dropped": 1}
    assert names((await second.get("/unknown"))[1]) == {"other": 1}


async def test_what_waits_is_loaded_though_no_more_are_kept_and_expires(
    make_service: Make, database: str, postgres: Postgres
) -> None:
    first = await make_service(
        database_url=database, unknown_events="keep", load_interval=3600
    ).start()
    assert (await first.post(SENT))[0] == 200
    await first.kill()
    second = await make_service(database_url=database).start()
    assert (await second.post(SENT))[1]["status_code"] == 7
    books = await second.drained()
    assert (books["recovered"], books["loaded"], books["balanced"]) == (1, 1, True)
    assert postgres.execute(database, "SELECT event::text FROM datapipe_unknown") == [(SENT,)]
    assert not second.logged("lane blocked")

    # nor are they kept for longer than is asked for
    await second.stop()
    older = "UPDATE datapipe_unknown SET received_at = received_at - interval '1 hour'"
    postgres.execute(database, older)
    second.settings["unknown_retention"] = "30 minutes"
    await second.start()

    async def gone() -> bool:
        return (await second.get("/unknown"))[1]["total"] == 0

    await until(gone, what="what is too old is gone")
    assert second.logged("rows removed")[0]["rows"] == 1


async def test_unless_it_is_asked_for_none_are_kept() -> None:
    async with datapipe.testing.service() as service:
        assert (await service.post(SENT))[1]["status_code"] == 7
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{service.url}status.json") as response:
                assert "datapipe_unknown" not in (await response.json())["lanes"]
            async with session.get(service.url) as response:
                assert "Unknown events" not in await response.text()


# of an event, the code of its answer
CASES = {
    sized(16_384): 0,
    sized(16_385): 6,
    '{"event_name": "%s"}' % ("n" * 48): 0,
    '{"event_name": "%s"}' % ("n" * 49): 7,
    '{"event_name": "New"}': 7,
    '{"event_name": " new"}': 7,
    '{"event_name": ""}': 7,
    '{"event_name": "datapipe_x"}': 7,
    '{"event_name": "datapipe_unknown"}': 7,
    '{"event_name": "new", "a": "\\u0000"}': 5,
    '{"event_name": "new", "a": {"b\\u0000": [1]}}': 5,
    '{"event_name": "new", "a": "\\\\u0000"}': 0,
    '{"event_name": "install"}': 4,  # a type that is registered is checked as ever
    r'{"event_name": "new", "a": "\ud800"}': 5,
    r'{"event_name": "new", "a": "\uDC00\uD800"}': 5,
    r'{"event_name": "new", "\ud83d": [1]}': 5,
    r'{"event_name": "new", "a": "\ud83d\ude00"}': 0,
    r'{"event_name": "new", "a": "\\ud83d"}': 0,
    r'{"event_name": "install", "user_id": 1, "timestamp": 1, "a": "\ud800"}': 3,
    r'{"event_name": "new", "a": "\ud800",}': 3,
    "[1]": 3,
}  # fmt: skip


async def test_what_is_kept_and_what_is_refused() -> None:
    async with datapipe.testing.service(unknown_events="keep") as service:
        for event, code in CASES.items():
            assert (await service.post(event))[1]["status_code"] == code, event
        kept = [row["event"] for row in await service.rows("datapipe_unknown")]
        assert kept == [json.loads(event) for event, code in CASES.items() if not code]
        _, answer = await service.post("\n".join(CASES))
        assert answer["accepted"] == 5


async def test_under_a_key_they_count_once_whatever_their_names() -> None:
    async with datapipe.testing.service(unknown_events="keep") as service:
        body = "\n".join(f'{{"event_name": "n{n}", "i": {i}}}' for i in range(3) for n in range(3))
        for _ in range(2):
            assert (await service.post(body, Idempotency_Key="once"))[0] == 200
        assert len(await service.rows("datapipe_unknown")) == 9


async def test_the_page_shows_them_escaped_and_its_buttons_act() -> None:
    known = {"known": {"a": "int"}}
    settings = {"unknown_events": "keep", "events": known}
    async with datapipe.testing.service(**settings) as service, aiohttp.ClientSession() as session:
        await service.post({"event_name": "new", "t": "<script>x"})
        await service.rows("datapipe_unknown")
        async with session.get(service.url) as response:
            page = await response.text()
        assert "new: 1 waiting to be named; a type that fits them: {&#34;new&#34;" in page
        assert "&lt;script&gt;x" in page
        assert "<script>x" not in page
        form, url = {"event_name": "new"}, f"{service.url}unknown/drop"
        elsewhere = {"Origin": "http://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
        async with session.post(url, data=form, headers=elsewhere) as response:
            assert response.status == 403
        async with session.post(url, data=form, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "../#unknown")
        assert await service.rows("datapipe_unknown") == []
        for body in ("{}", '{"all": false}', '{"name": "new"}', '{"event_name": 1}', "{"):
            async with session.post(url, data=body) as response:
                assert response.status == 400


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATAPIPE_CNF", str(tmp_path / "settings.json"))
    settings = {"database_url": f"sqlite:///{tmp_path}/e.db", "data_dir": str(tmp_path)}
    errors: list[str] = []

    def run(*words: str) -> tuple[int, str]:
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        capsys.readouterr()
        code = main([*words])
        printed = capsys.readouterr()
        errors[:] = printed.err.splitlines()
        return code, printed.out

    async def keep(*events: str) -> None:
        unknown = UnknownType()
        rows = [unknown.look_closer(event.encode(), "2026-01-02 03:04:05") for event in events]
        segment = Segment(unknown.name, unknown.columns, b"".join(rows), len(rows))
        async with open_sink(Settings(**settings), "one") as sink:
            await sink.load(table_of(unknown), [segment])

    asyncio.run(keep('{"event_name": "a", "k": 1}', '{"event_name": "a"}', '{"event_name": "b"}'))
    assert run("unknown", "list", "--limit", "1")[1].splitlines() == [
        'a: 2 waiting to be named; a type that fits them: {"a": {"k": "int?"}}',
        'b: 1 waiting to be named; a type that fits them: {"b": {}}',
        "#3  2026-01-02 03:04:05  b",
        '    {"event_name": "b"}',
        "total: 3",
    ]
    assert "unknown events: 3 are kept: a (2), b (1); see datapipe unknown list" in run("check")[1]
    assert json.loads(run("unknown", "list", "--json", "--name", "b")[1])["total"] == 1
    assert run("unknown", "replay", "--name", "a") == (1, "refused: 0\nstill unknown: 2\n")
    assert "these settings (--config) do not have the types" in errors[-1]
    settings["events"] = {"a": {"k": "int"}}
    assert "2 of a, whose type is registered by now" in run("check")[1]
    moved = "replayed a: 1 rows\nrefused: 1\nstill unknown: 1\n"
    assert run("unknown", "replay", "--all") == (1, moved)
    assert "1 refused: k: this field is missing" in run("unknown", "list", "--name", "a")[1]
    assert run("unknown", "drop", "--id", "2") == (0, "dropped: 1\n")
    assert run("unknown", "drop")[0] == 2
    assert run("unknown", "drop", "--all") == (0, "dropped: 1\n")
    assert run("dead", "replay", "--type", "instal") == (0, "still dead: 0\n")
    assert "no dead letter is among these" in errors[-1]
