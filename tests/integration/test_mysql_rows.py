"""LOAD DATA LOCAL into MariaDB: values come back as sent, refused rows are found exactly."""

from __future__ import annotations

import json
import random
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest

from datapipe.events.segment import Segment
from datapipe.events.types import Column, Event, EventType
from datapipe.settings import Settings
from datapipe.sinks import Loaded, Selection, Table, open_sink, table_of
from datapipe.sinks.mysql import copy
from datapipe.sinks.mysql.sink import MysqlPlugin, MySqlSink
from tests.mariadb import MariaDB

AT = "2026-01-02 03:04:05.678901"


class Typed(Event):
    i: int | None = None
    f: float | None = None
    s: str | None = None
    b: bool | None = None
    t: datetime | None = None
    d: date | None = None
    n: Decimal | None = None
    u: UUID | None = None
    j: dict | None = None  # type: ignore[type-arg]


TYPED = EventType("typed", Typed, 1_000_000, MysqlPlugin.limits)


@pytest.fixture
async def sink(mysql_database: str) -> AsyncIterator[MySqlSink]:
    async with open_sink(Settings(database_url=mysql_database), "one") as sink:
        assert isinstance(sink, MySqlSink)
        yield sink


def segment(kind: EventType, *events: dict[str, Any], neutral: bool = True) -> Segment:
    data = b"".join(kind.look_closer(msgspec.json.encode(event), AT) for event in events)
    return Segment(kind.name, kind.columns, data, len(events), neutral=neutral)


# --- values ---

VALUES: dict[str, list[Any]] = {
    "i": [0, -1, 2**63 - 1, -(2**63), None],
    "f": [0.1, 1e308, 5e-324, 1.7976931348623157e308, -2.5, None],
    "s": [
        "", "a\tb\nc\rd\\e", "\\N", "\\", "'\"`%s%%", "\x1a\x08\x01", "é", "e\u0301", "😀", " x ",
        "NULL", "\u2028", "A", "a", "x" * 100_000, None,
    ],
    "b": [True, False, None],
    "t": [
        "2026-01-02T03:04:05.123456+00:00", "2026-01-02T03:04:05+02:30", "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999Z", "2038-06-01T00:00:00", None,
    ],
    "d": ["0001-01-01", "9999-12-31", "2024-02-29", None],
    "n": ["0", "-1.5", "1E+34", "0." + "9" * 30, "9" * 35 + "." + "9" * 30, "1e-30", None],
    "u": ["123e4567-e89b-12d3-a456-426614174000", "ffffffff-ffff-ffff-ffff-ffffffffffff", None],
    "j": [
        {}, {"a": [1, 2.50, "\t\\\"", None, True]}, {"big": 10**40}, {"": {"😀": "\u2028"}},
        json.loads('{"a":' * 30 + "[]" + "}" * 30), None,
    ],
}  # fmt: skip


def stored(field: str, value: Any) -> Any:
    """What the driver reads, as it should be."""
    if value is None or field in "ifsu":
        return value
    if field == "t":
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    if field == "j":
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return {"b": int, "d": date.fromisoformat, "n": Decimal}[field](value)


@pytest.mark.parametrize("field", VALUES)
async def test_values_come_back_as_they_were_sent(
    sink: MySqlSink, mysql_database: str, field: str
) -> None:
    values = VALUES[field]
    loaded = await sink.load(table_of(TYPED), [segment(TYPED, *({field: v} for v in values))])
    assert (loaded.loaded, loaded.dead) == (len(values), 0), loaded
    rows = MariaDB.execute(mysql_database, f"SELECT {field}, received_at FROM typed")
    assert [value for value, _ in rows] == [stored(field, value) for value in values]
    assert {at for _, at in rows} == {datetime.fromisoformat(AT)}


async def test_case_and_accents_are_told_apart(sink: MySqlSink, mysql_database: str) -> None:
    await sink.load(table_of(TYPED), [segment(TYPED, *({"s": s} for s in ("a", "A", "ä")))])
    assert MariaDB.execute(mysql_database, "SELECT count(*) FROM typed WHERE s = 'a'") == [(1,)]


async def test_rows_of_release_1_0_have_offsets(sink: MySqlSink, mysql_database: str) -> None:
    """Also times within an event, NULL among them."""
    line = b"\t".join([b"\\N"] * 4 + [b"%s"] + [b"\\N"] * 4 + [b"2026-01-02 03:04:05+00:00"])
    times = b"2026-01-01 00:00:00.5+02:30", b"\\N", b"2026-01-01 00:00:00-00:30"
    data = b"".join(line % time + b"\n" for time in times)
    loaded = await sink.load(table_of(TYPED), [Segment("typed", TYPED.columns, data, 3)])
    assert (loaded.loaded, loaded.dead) == (3, 0), loaded
    rows = MariaDB.execute(mysql_database, "SELECT t, received_at FROM typed")
    assert [time for time, _ in rows] == [
        datetime(2025, 12, 31, 21, 30, 0, 500_000), None, datetime(2026, 1, 1, 0, 30)
    ]  # fmt: skip
    assert {at for _, at in rows} == {datetime(2026, 1, 2, 3, 4, 5)}


async def test_defaults_are_those_of_the_columns(sink: MySqlSink, mysql_database: str) -> None:
    class Defaulted(Event):
        i: int = -7
        f: float = 0.1
        s: str = 'it\'s \\n "%s"'
        b: bool = True
        t: datetime = datetime(2026, 1, 2, tzinfo=UTC)
        n: Decimal = Decimal("1.50")
        u: UUID = UUID(int=1)
        j: dict = {"a": "'\\"}  # type: ignore[type-arg]

    kind = EventType("defaulted", Defaulted, 10_000, MysqlPlugin.limits)
    await sink.load(table_of(kind), [segment(kind, {})])
    MariaDB.execute(mysql_database, f"INSERT INTO defaulted (received_at) VALUES ('{AT}')")
    first, second = MariaDB.execute(mysql_database, "SELECT * FROM defaulted")
    assert first == second
    assert first[2] == Defaulted.s
    MariaDB.execute(mysql_database, "DROP TABLE defaulted")
    for statement in sink.ddl([table_of(kind)]).split(";\n\n")[:-1]:  # as a person would run it
        MariaDB.execute(mysql_database, statement.replace("CREATE TABLE", "CREATE OR REPLACE TABLE")
                        .replace("CREATE INDEX", "CREATE OR REPLACE INDEX"))  # fmt: skip
    MariaDB.execute(mysql_database, f"INSERT INTO defaulted (received_at) VALUES ('{AT}')")
    assert MariaDB.execute(mysql_database, "SELECT * FROM defaulted") == [second]


# --- refused rows ---

COLUMNS = (
    Column("id", "bigint"), Column("n", "bigint"), Column("t", "text"), Column("j", "jsonb"),
    Column("received_at", "timestamptz"),
)  # fmt: skip
ODD = Table("odd", COLUMNS)
_ID = re.compile(rb'"id":([0-9]+)')  # not all of it is JSON here: ingest would have refused it
GOOD = ("1", "text", "{}")


def rows(count: int, bad: dict[int, tuple[str, str, str]]) -> Segment:
    lines = ["\t".join((str(n), *bad.get(n, GOOD), AT)) + "\n" for n in range(count)]
    return Segment("odd", COLUMNS, "".join(lines).encode(), count, neutral=True)


# by the error's code: the value of n, t and j that is refused, and its SQLSTATE
FAULTS = {
    "check": (("13", "text", "{}"), "23000"),
    "json": (("1", "text", "{"), "23000"),
    "unique": (("1", "first", "{}"), "23000"),
    "foreign": (("99", "text", "{}"), "23000"),
    "type": (("x", "text", "{}"), "22007"),
    "range": (("9" * 30, "text", "{}"), "22003"),
    "long": (("1", "y" * 300, "{}"), "01000"),
    "null": (("\\N", "text", "{}"), "23000"),
    "raised": (("77", "text", "{}"), "45000"),
}


def harden(url: str) -> None:
    for statement in (
        "CREATE TABLE allowed (n BIGINT PRIMARY KEY)",
        "INSERT INTO allowed VALUES (1), (13), (77)",
        "ALTER TABLE odd MODIFY n BIGINT NOT NULL, MODIFY t VARCHAR(255), ADD CHECK (n <> 13),"
        " ADD k VARCHAR(255) AS (IF(t = 'text', NULL, t)) STORED, ADD UNIQUE (k),"
        " ADD FOREIGN KEY (n) REFERENCES allowed (n)",
        "INSERT INTO odd (id, n, t) VALUES (-1, 1, 'first')",
        "CREATE TRIGGER raises BEFORE INSERT ON odd FOR EACH ROW"
        " IF NEW.n = 77 THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'at row 1'; END IF",
    ):
        MariaDB.execute(url, statement)


async def load(sink: MySqlSink, url: str, count: int, bad: dict[int, Any]) -> Loaded:
    """All but the bad ones are loaded, and those are dead letters."""
    loaded = await sink.load(ODD, [rows(count, bad)], accept_dead=True)
    assert (loaded.loaded, loaded.dead) == (count - len(bad), len(bad))
    there = MariaDB.execute(url, "SELECT id FROM odd WHERE id >= 0 ORDER BY id")
    assert [id for (id,) in there] == [n for n in range(count) if n not in bad]
    letters = (await sink.find(Selection(), count))["letters"]
    assert sorted(int(_ID.findall(bytes(each["event"]))[0]) for each in letters) == sorted(bad)
    return loaded


@pytest.mark.parametrize("fault", FAULTS)
async def test_one_refused_row_costs_itself_alone(
    sink: MySqlSink, mysql_database: str, fault: str
) -> None:
    await sink.prepare(ODD)
    harden(mysql_database)
    values, state = FAULTS[fault]
    await load(sink, mysql_database, 20, {7: values})
    (letter,) = (await sink.find(Selection(), 10))["letters"]
    assert letter["sqlstate"] == state, letter
    column = {"type": "n", "range": "n", "null": "n", "long": "t", "json": "j", "foreign": "n"}.get(
        fault
    )
    assert letter["column_name"] == column


@pytest.fixture(params=[True, False], ids=["numbered", "halved"])
def numbered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the numbers that MariaDB gives since 10.7, and without, as MySQL does."""
    if not request.param:
        monkeypatch.setattr(copy, "_ROW_NUMBERS", copy.re.compile("never"))
    return bool(request.param)


async def test_refused_rows_of_all_kinds_are_found_exactly(
    sink: MySqlSink, mysql_database: str, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them those that a CHECK refuses, behind which the server's numbers are wrong."""
    await sink.prepare(ODD)
    harden(mysql_database)
    MariaDB.execute(mysql_database, "DROP TRIGGER raises")
    tries: list[int] = []
    _count_tries(monkeypatch, tries)
    random.seed(7)
    kinds = [FAULTS[name][0] for name in FAULTS if name != "raised"]
    bad = {n: random.choice(kinds) for n in random.sample(range(3000), 60)}
    await load(sink, mysql_database, 3000, bad)
    assert len(tries) < (66 if numbered else 1500)


async def test_of_rows_that_are_one_by_a_key_the_first_stays(
    sink: MySqlSink, mysql_database: str, numbered: bool
) -> None:
    await sink.prepare(ODD)
    harden(mysql_database)
    twice = dict.fromkeys((3, 5, 8), ("1", "again", "{}"))
    lines = [("\t".join((str(n), *twice.get(n, GOOD), AT))) for n in range(10)]
    data = "".join(f"{line}\n" for line in lines).encode()
    loaded = await sink.load(ODD, [Segment("odd", COLUMNS, data, 10, neutral=True)])
    assert (loaded.loaded, loaded.dead) == (8, 2)
    assert "again" not in "".join(loaded.refused)  # it goes into the log
    there = MariaDB.execute(mysql_database, "SELECT id FROM odd WHERE t = 'again'")
    assert there == [(3,)]


async def test_a_table_that_warns_without_rows_blocks_and_refuses_none(
    sink: MySqlSink, mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datapipe.errors import LaneBlocked
    from datapipe.sinks.mysql.connections import LoadConnection

    await sink.prepare(ODD)
    real = LoadConnection.load
    monkeypatch.setattr(LoadConnection, "load", lambda *args: (real(*args)[0], 1))
    with pytest.raises(LaneBlocked):
        await sink.load(ODD, [rows(5, {})])
    monkeypatch.undo()
    assert (await sink.load(ODD, [rows(5, {})])).loaded == 5


def _count_tries(monkeypatch: pytest.MonkeyPatch, tries: list[int]) -> None:
    real: Callable[..., Any] = copy.Copier._try

    def counted(self: copy.Copier, rows: Any) -> Any:
        tries.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(copy.Copier, "_try", counted)
