"""The oldest PostgreSQL that we promise, and the newest: refused rows, SQLSTATEs, values, letters.

The sink alone, without a service; 17 has all of this with one, each in a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.events.registry import declared_class
from datapipe.events.segment import Segment
from datapipe.events.types import EventType
from datapipe.settings import Settings
from datapipe.sinks import Database, Loaded, Selection, open_sink, table_of
from tests.integration import test_refused_rows as refused
from tests.integration.test_sqlstates import (
    BLOCKS,
    EVERYWHERE,
    FIELDS,
    LATER,
    REFUSES,
    as_app,
    trigger,
)
from tests.postgres import VERSIONS, Postgres

AT = "2026-01-02 03:04:05.678901"


@dataclass(slots=True)
class World:
    """A database of a server of that version, empty at first, and the sink."""

    version: str
    url: str
    sink: Database

    def execute(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return Postgres.execute(self.url, sql, *values)

    async def load(self, kind: EventType, *events: dict[str, Any]) -> Loaded:
        bodies = [json.dumps({"event_name": kind.name, **event}).encode() for event in events]
        rows = b"".join(kind.look_closer(body, AT) for body in bodies)
        return await self.sink.load(
            table_of(kind), [Segment(kind.name, kind.columns, rows, len(events))]
        )

    def numbers(self, lane: str) -> list[int]:
        return [n for (n,) in self.execute(f"SELECT n FROM {lane} ORDER BY n")]


@pytest.fixture(params=VERSIONS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    server: Postgres = request.getfixturevalue(f"postgres{request.param}")
    url = server.create_database()
    async with open_sink(Settings(database_url=as_app(server, url)), "test") as sink:
        yield World(request.param, url, sink)


async def test_it_is_the_version_that_is_meant(world: World) -> None:
    ok, text = (await world.sink.check([]))[0]
    assert ok == "ok"
    assert text.startswith(f"database: PostgreSQL {world.version}.")


async def test_exactly_the_bad_rows_are_refused(world: World) -> None:
    """However the table says so, and whatever the error's context names."""
    for harm, text in refused.CASES.values():
        world.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        async with open_sink(Settings(database_url=world.url), "test") as sink:
            await sink.prepare(refused.TABLE)
            world.execute(harm)
            result = await sink.load(refused.TABLE, refused.segments(text, "1"))
        assert (result.loaded, result.dead) == (2000 - len(refused.BAD), len(refused.BAD)), harm
        letters = "SELECT (event->>'n')::bigint FROM datapipe_dead_letters ORDER BY id"
        assert [n for (n,) in world.execute(letters)] == list(refused.BAD), harm
        assert len(world.numbers("rows WHERE n >= 0")) == 2000 - len(refused.BAD), harm


def declared(lane: str, fields: dict[str, str] = FIELDS) -> EventType:
    return EventType(lane, declared_class(lane, fields))


async def test_a_row_is_refused(world: World) -> None:
    for lane, (harm, sqlstate) in REFUSES.items():
        kind = declared(lane)
        await world.load(kind, {"n": 0, "t": "0"})
        world.execute(harm.format(lane=lane))
        there = len(world.numbers(lane))
        events = [{"n": n, "t": None if n == 13 else str(n)} for n in range(1, 25)]
        result = await world.load(kind, *events)
        assert (result.loaded, result.dead) == (23, 1), lane
        assert len(world.numbers(lane)) == there + 23, lane
        (letter,) = (await world.sink.find(Selection(lane=lane), 10))["letters"]
        assert (letter["sqlstate"], json.loads(bytes(letter["event"]))["n"]) == (sqlstate, 13)


async def test_a_lane_is_blocked_until_a_person_acts(world: World) -> None:
    for lane, (harm, sqlstate, repair) in BLOCKS.items():
        kind = declared(lane)
        await world.load(kind, {"n": 0})
        world.execute(harm.format(lane=lane))
        with pytest.raises(LaneBlocked, match=sqlstate):
            await world.load(kind, {"n": 1})
        world.execute(repair.format(lane=lane))
        await world.load(kind, {"n": 2})
        assert world.numbers(lane) == [0, 2]


@pytest.mark.parametrize("codes", [LATER, EVERYWHERE], ids=["of_a_lane", "of_all"])
async def test_a_load_is_for_later(world: World, codes: tuple[str, ...]) -> None:
    """Nothing is dead: what raised it may be over soon."""
    for code in codes:
        lane = f"later_{code.lower()}"
        kind = declared(lane)
        await world.load(kind, {"n": 0})
        world.execute(trigger(f"RAISE 'no' USING ERRCODE = '{code}';").format(lane=lane))
        with pytest.raises(SinkUnavailable) as error:
            await world.load(kind, {"n": 1})
        assert error.value.everywhere == (codes is EVERYWHERE), code
        assert world.numbers(lane) == [0]


async def test_what_is_missing_is_made_again(world: World) -> None:
    kind = declared("less")
    await world.load(kind, {"n": 0})
    for n, harm in enumerate(("DROP TABLE less", "ALTER TABLE less DROP COLUMN t"), 1):
        world.execute(harm)
        await world.load(kind, {"n": n, "t": "text"})
    assert world.execute("SELECT n, t FROM less ORDER BY n") == [(1, None), (2, "text")]


VALUES: dict[str, tuple[str, list[Any]]] = {
    "i": ("int", [0, -(2**63), 2**63 - 1]),
    "f": ("float", [0.1, -1e-300, 1.7976931348623157e308, 5e-324]),
    "s": (
        "str",
        ["", "\\N", "\\.", "\\.\n", "a\tb\r\nc\x01\x7f\\", "\u2028\U0001f600", '"\\u0000'],
    ),
    "b": ("bool", [True, False]),
    "d": ("dict", [{}, {"a\n\t\\": ["\\N", 1.5, None, {"\u20ac": "\U0001f600"}]}]),
    "l": ("list", [[], [[[]], {}, "\\."]]),
    "m": ("Decimal", ["19.990", "-0.00000000000000000001", "9" * 100]),
    "u": ("UUID", ["7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f"]),
    "t": ("datetime", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"]),
    "a": ("date", ["0001-01-01", "2024-02-29", "9999-12-31"]),
}
# as text that JSON would give, whatever the time zone of the session
_TEXT = {
    "m": "m::text",
    "t": "to_char(t AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS')"
    " || rtrim(to_char(t AT TIME ZONE 'UTC', '.US'), '.0') || 'Z'",
    "a": "a::text",
    "u": "u::text",
}


async def test_values_are_read_back_as_they_were_sent(world: World) -> None:
    """Also those of events that were dead, and came back."""
    kind = declared(
        "note", {"n": "int", **{name: f"{type}?" for name, (type, _) in VALUES.items()}}
    )
    sent = [(name, value) for name, (_, values) in VALUES.items() for value in values]
    events = [{"n": n, name: value} for n, (name, value) in enumerate(sent)]
    assert (await world.load(kind, *events)).loaded == len(sent)
    world.execute("ALTER TABLE note ADD CHECK (n < 1000) NOT VALID")
    again = [{**event, "n": event["n"] + 1000} for event in events]
    assert (await world.load(kind, *again)).dead == len(sent)
    world.execute("ALTER TABLE note DROP CONSTRAINT note_n_check")

    def check(lane: str, raw: bytes, received_at: str) -> bytes:
        return kind.look_closer(raw, received_at)

    back = await world.sink.replay(Selection(), {"note": table_of(kind)}, check)
    assert back == ({"note": len(sent)}, 0)
    for n, (name, value) in enumerate(sent):
        for at in (n, n + 1000):
            sql = f"SELECT {_TEXT.get(name, name)}, received_at = '{AT}+00' FROM note WHERE n = %s"
            assert world.execute(sql, at) == [(value, True)], (name, value, at)
