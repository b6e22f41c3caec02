"""Databases whose encoding lacks what clients send: it costs the event that holds it, and no more.

Such a dead letter is kept all the same, and shown and put back as it was sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.commands import command
from tests.postgres import Postgres
from tests.service import Service

Make = Callable[..., Service]

LACKING = ("LATIN1", "WIN1252", "EUC_JP")
NOTE = {"note": {"n": "int", "t": "str", "d": "dict", "at": "datetime?"}}
ODD = 'x\U0001f600 "quoted" \\ back\\u00e9\n\ttab \u2028 \u0e01 \\ud83d\\ude00'
# what `jsonb` refuses in any database
TINY = '{"event_name": "note", "n": 7, "t": "tiny", "d": {"n": 1e-20000}, "at": null}'


def note(n: int, t: str, d: dict[str, Any] | None = None) -> dict[str, Any]:
    at = "2026-01-02T03:04:05.678901+00:00"
    return {"event_name": "note", "n": n, "t": t, "d": d or {}, "at": at}


def sent(event: dict[str, Any]) -> list[Any]:
    """What a client said; a time may be told in another form."""
    return [event[key] for key in ("event_name", "n", "t", "d")]


async def letters(service: Service) -> dict[str, Any]:
    status, found = await service.get("/dead")
    assert status == 200, found
    return found


async def act(service: Service, what: str, **selection: Any) -> dict[str, Any]:
    url = f"{service.url}/dead/{what}"
    async with service.session.post(url, json=selection or {"all": True}) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


LETTERS = "datapipe_dead_letters"


def move(letter_of: str, to: str) -> None:
    """Dead letters into another database, as a dump takes them."""
    columns = "lane, event, sqlstate, message, column_name, segment"
    asked = f"SELECT lane, event::text, sqlstate, message, column_name, segment FROM {LETTERS}"
    for row in Postgres.execute(f"{letter_of}?client_encoding=UTF8", asked):
        Postgres.execute(to, f"INSERT INTO {LETTERS} ({columns}) VALUES (%s,%s,%s,%s,%s,%s)", *row)


@pytest.mark.parametrize("encoding", LACKING)
async def test_one_emoji_costs_one_event(
    make_service: Make, postgres: Postgres, encoding: str
) -> None:
    database = postgres.create_database(encoding)
    service = await make_service(database_url=database, events=NOTE).start()
    odd = note(50, ODD, {"k\U0001f600": ["\U0001f600", 1.5, {"x": "\\u00e9"}]})
    batch = [note(n, "plain") for n in range(100)]
    status, _ = await service.post([*batch[:50], odd, *batch[50:]])
    assert status == 200
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (100, 1, True)

    ((letter),) = (await letters(service))["letters"]
    assert letter["sqlstate"] == "22P05"
    assert sent(letter["event"]) == sent(odd)
    groups = (await letters(service))["groups"]
    assert [(g["lane"], g["sqlstate"], g["count"]) for g in groups] == [("note", "22P05", 1)]
    code, text = await command(service.file, "dead", "list")
    assert code == 0, text
    (shown,) = [line for line in text.splitlines() if line.startswith("    {")]
    assert json.loads(shown) == letter["event"]

    assert await act(service, "replay") == {"replayed": {"note": 0}, "dead": 1}
    ((again),) = (await letters(service))["letters"]
    assert again["event"] == letter["event"]

    other = postgres.create_database()
    moved = await make_service(database_url=other, events=NOTE).start()
    await moved.post(note(1, "makes the tables"))
    await moved.drained()
    move(database, other)
    assert await act(moved, "replay") == {"replayed": {"note": 1}, "dead": 0}
    sql = (
        "SELECT t, d, (at AT TIME ZONE 'UTC')::text, (received_at AT TIME ZONE 'UTC')::text"
        " FROM note WHERE n = 50"
    )
    ((t, d, at, received_at),) = postgres.execute(other, sql)
    assert (t, d) == (odd["t"], odd["d"])
    assert at == "2026-01-02 03:04:05.678901"
    assert letter["event"]["received_at"].replace("T", " ")[:19] == received_at[:19]


async def test_no_client_can_block_a_lane_with_what_the_encoding_lacks(
    make_service: Make, postgres: Postgres
) -> None:
    """It says nothing of the table: the guard does not count it."""
    service = await make_service(
        database_url=postgres.create_database("LATIN1"), events=NOTE
    ).start()
    await service.post([note(n, "\U0001f600") for n in range(250)])
    await service.post([note(n, "plain", {"n": "\u0142"}) for n in range(250)])
    await service.post("[" + ", ".join([TINY] * 150) + "]")
    await service.post([note(n, "plain") for n in range(10)])
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (10, 650, True)
    assert not service.logged("lane blocked")


async def test_sql_ascii_holds_every_text_but_escapes_in_json(
    make_service: Make, postgres: Postgres
) -> None:
    database = postgres.create_database("SQL_ASCII")
    service = await make_service(database_url=database, events=NOTE).start()
    escaped = '{"event_name": "note", "n": 1, "t": "%s", "d": {"x":  "\\ud83d\\ude00 \\u00e9"}}'
    await service.post(note(0, ODD, {"k": 1}))
    await service.post((escaped % "\U0001f600").encode())
    books = await service.drained()
    assert (books["loaded"], books["dead"], books["balanced"]) == (1, 1, True)
    rows = postgres.execute(f"{database}?client_encoding=UTF8", "SELECT n, t FROM note")
    assert rows == [(0, ODD)]
    ((letter),) = (await letters(service))["letters"]
    assert letter["event"].items() >= {"t": "\U0001f600", "d": {"x": "\U0001f600 \u00e9"}}.items()
    postgres.execute(database, "ALTER TABLE note ALTER d TYPE json")
    assert await act(service, "replay") == {"replayed": {"note": 1}, "dead": 0}
    found = postgres.execute(f"{database}?client_encoding=UTF8", "SELECT t, d::text FROM note")
    assert found[1:] == [("\U0001f600", '{"x":  "\\ud83d\\ude00 \\u00e9"}')]


async def test_a_value_that_raises_a_message_which_the_encoding_lacks(
    make_service: Make, postgres: Postgres
) -> None:
    """The letter's reason is text from elsewhere, too: a type of one's own speaks of the value."""
    database = postgres.create_database("SQL_ASCII")
    service = await make_service(database_url=database, events=NOTE).start()
    await service.post(note(0, "makes the table"))
    await service.drained()
    harm = 'ALTER TABLE note ADD CONSTRAINT "n\u00f6" CHECK (n < 5)'
    postgres.execute(f"{database}?client_encoding=UTF8", harm)
    await service.post(note(7, "x"))
    assert (await service.drained())["dead"] == 1
    ((letter),) = (await letters(service))["letters"]
    assert "n\u00f6" in letter["message"]


async def test_letters_of_older_versions_are_read(
    make_service: Make, postgres: Postgres, database: str
) -> None:
    """Until now each was a JSON object, and a value that `jsonb` refuses a string in it."""
    service = await make_service(database_url=database, events=NOTE).start()
    await service.post(note(0, "makes the tables"))
    await service.drained()
    old = json.dumps({**note(1, ODD, {"k": [1.5]}), "received_at": "2026-01-01T00:00:00+00:00"})
    postgres.execute(
        database, f"INSERT INTO {LETTERS} (lane, event, sqlstate) VALUES ('note', %s, 'P0001')", old
    )
    assert (await letters(service))["letters"][0]["event"] == json.loads(old)
    assert await act(service, "replay") == {"replayed": {"note": 1}, "dead": 0}
    sql = "SELECT t, d, received_at = '2026-01-01Z' FROM note WHERE n = 1"
    assert postgres.execute(database, sql) == [(ODD, {"k": [1.5]}, True)]


async def test_what_jsonb_refuses_goes_back_as_it_was_sent(
    make_service: Make, postgres: Postgres, database: str
) -> None:
    service = await make_service(database_url=database, events=NOTE).start()
    await service.post(TINY)
    assert (await service.drained())["dead"] == 1
    postgres.execute(database, "ALTER TABLE note ALTER d TYPE json")
    assert await act(service, "replay") == {"replayed": {"note": 1}, "dead": 0}
    assert postgres.execute(database, "SELECT d::text FROM note") == [('{"n": 1e-20000}',)]


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
async def test_check_tells_of_the_encoding(
    make_service: Make, postgres: Postgres, encoding: str
) -> None:
    service = make_service(database_url=postgres.create_database(encoding))
    service.file.write_text(json.dumps(service.settings))
    code, text = await command(service.file, "check")
    assert code == 0, text
    assert ("encoding is LATIN1" in text) == (encoding == "LATIN1")


async def test_letters_are_looked_for_by_any_text(make_service: Make, postgres: Postgres) -> None:
    """A lane that the encoding can't even name is none: no fault of the database."""
    service = await make_service(database_url=postgres.create_database("LATIN1")).start()
    await service.load()
    assert (await service.get("/dead?lane=\U0001f600"))[0] == 400
    assert (await service.get("/dead?lane=nobody"))[0] == 200
