"""Rows in SQLite: what was sent is read back equal, and what a table refuses costs itself only."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.errors import EventRejected, LaneBlocked
from datapipe.events.segment import Segment
from datapipe.events.types import Column, Event, EventType
from datapipe.settings import Settings
from datapipe.sinks import Loaded, Selection, Table, open_sink, table_of
from datapipe.sinks.sqlite import copy
from datapipe.sinks.sqlite.connections import Connection
from datapipe.sinks.sqlite.dialect import DIALECT
from datapipe.sinks.sqlite.sink import SqlitePlugin
from datapipe.sinks.transaction import Rows

AT = "2026-01-02 03:04:05.000006"
N, T, RECEIVED = Column("n", "bigint"), Column("t", "text"), Column("received_at", "timestamptz")
ROWS = Table("rows", (N, T, RECEIVED))


class Everything(Event):
    i: int | None
    f: float | None
    s: str | None
    b: bool | None
    at: datetime | None
    d: date | None
    n: Decimal | None
    u: UUID | None
    o: dict | None  # type: ignore[type-arg]
    l: list | None  # type: ignore[type-arg]  # noqa: E741


KIND = EventType("everything", Everything, 2**20, SqlitePlugin.limits)

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=4,
)
VALUES = {
    "i": st.integers(-(2**63), 2**63 - 1),
    "f": st.floats(allow_nan=False, allow_infinity=False),
    "s": text,
    "b": st.booleans(),
    "at": st.datetimes(
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30))])
    ),
    "d": st.dates(),
    "n": st.decimals(allow_nan=False, allow_infinity=False),
    "u": st.uuids(),
    "o": st.dictionaries(text, nested),
    "l": st.lists(nested),
}
events = st.fixed_dictionaries({name: st.none() | value for name, value in VALUES.items()})


def execute(path: Path, *statements: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [row for each in statements for row in connection.execute(each)]


def script(path: Path, statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(statements)


async def load(path: Path, table: Table, data: bytes, **more: Any) -> Loaded:
    segment = Segment(table.name, table.columns, data, data.count(b"\n"), neutral=True)
    async with open_sink(Settings(database_url=f"sqlite:///{path}"), "one") as sink:
        return await sink.load(table, [segment], **more)


async def letters(path: Path) -> list[dict[str, Any]]:
    async with open_sink(Settings(database_url=f"sqlite:///{path}"), "one") as sink:
        found: list[dict[str, Any]] = (await sink.find(Selection(), 100))["letters"]
        return found


# --- values ---


def sent(event: dict[str, Any]) -> bytes:
    return msgspec.json.encode({**event, "event_name": "everything"})


def read(row: Sequence[Any]) -> dict[str, Any]:
    """The event that a row holds."""
    i, f, s, b, at, d, n, u, o, l = row  # noqa: E741
    return {
        "i": i,
        "f": f,
        "s": s,
        "b": None if b is None else {0: False, 1: True}[b],
        "at": at and datetime.fromisoformat(at).replace(tzinfo=UTC),
        "d": d and date.fromisoformat(d),
        "n": n and Decimal(n),
        "u": u and UUID(u),
        "o": o and json.loads(o),
        "l": l and json.loads(l),
    }


def same(value: Any, other: Any) -> bool:
    return str(value) == str(other) if isinstance(value, Decimal) else bool(value == other)


@pytest.fixture(scope="module")
def empty() -> Iterator[Connection]:
    """A database in memory, with the table of that type."""
    with closing(sqlite3.connect(":memory:", factory=Connection)) as connection:
        connection.go_on = lambda: None
        for statement in DIALECT.create(table_of(KIND)):
            connection.execute(statement)
        yield connection


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(many=st.lists(events, min_size=1, max_size=5))
def test_what_was_sent_is_read_back_equal(empty: Connection, many: list[dict[str, Any]]) -> None:
    look(empty, many)


def look(connection: Connection, many: list[dict[str, Any]]) -> None:
    rows, held = [], []
    for event in many:
        with suppress(EventRejected):  # a time past 9999 in UTC
            rows.append(KIND.look_closer(sent(event), AT))
            held.append(event)
    connection.execute("DELETE FROM everything")
    data = Rows("1", b"".join(rows))
    assert copy.copy_rows(connection, "everything", KIND.columns, [data]) == []
    found = connection.execute(f"SELECT {', '.join(VALUES)}, received_at FROM everything")
    for event, (*row, at) in zip(held, found, strict=True):
        back = read(row)
        assert at == AT
        assert all(same(event[name], back[name]) for name in VALUES), (event, back)


HOSTILE = [
    "", "\\N", "\\", "\\\\", "\\t", "\t", "\n", "\r", "\r\n", "\\\t\\n", "\u2028", "\x1a", "\x7f",
    "\ufeff", "\U0010ffff", "\x85", "'", '"', "''; DROP TABLE everything; --", "?1", ":s", "%s",
    "%", "\\.", "True", "NULL", "x" * 70_000, "é" * 40_000, "-0.0", "1e5", "a\\",
]  # fmt: skip
EXTREMES: dict[str, list[Any]] = {
    "s": HOSTILE,
    "i": [0, -1, 2**63 - 1, -(2**63), 2**53 + 1],
    "f": [
        2.844140741178161e289,
        5e-324,
        1.7976931348623157e308,
        0.1,
        1.0,
        1e15,
        123456789.123456789,
        2.0**63,
    ],
    "n": [Decimal(x) for x in ("0", "-0", "1.10", "1e300", "9" * 60 + ".0000000000000000000001")],
    "at": [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)],
    "o": [{}, {"é\t\n": ["\\", "\r", {"": None}]}, {"n": 10**40}],
    "l": [[], [[[]]], ["\\N"], [1.0, -0.0]],
}


def test_hostile_values_are_read_back_equal(empty: Connection) -> None:
    nothing = dict.fromkeys(VALUES)
    look(empty, [{**nothing, name: value} for name, of in EXTREMES.items() for value in of])


def test_a_negative_zero_loses_its_sign(empty: Connection) -> None:
    """SQLite stores whole numbers as integers, also in a REAL column."""
    look(empty, [{**dict.fromkeys(VALUES), "f": -0.0}])
    assert str(empty.execute("SELECT f FROM everything").fetchone()[0]) == "0.0"


async def test_what_is_plain_text_is_read_without_a_closer_look(tmp_path: Path) -> None:
    """The ends of pieces fall into the middle of rows and of characters."""
    path = tmp_path / "events.db"
    lines = [f"{n}\t{'é' * (n % 97)}\t{AT}\n" for n in range(5000)]
    assert await load(path, ROWS, "".join(lines).encode()) == Loaded(5000)
    assert execute(path, "SELECT n, t, received_at FROM rows ORDER BY rowid") == [
        (n, "é" * (n % 97), AT) for n in range(5000)
    ]


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("2026-01-02 03:04:05+00:00", "2026-01-02 03:04:05"),
        ("2026-01-02 03:04:05.5+02:30", "2026-01-02 00:34:05.500000"),
        ("2026-01-02 03:04:05-08:00", "2026-01-02 11:04:05"),
        ("0001-01-01 00:00:00+02:00", "0001-01-01 00:00:00+02:00"),  # it has no time in UTC
        ("\\N", None),
    ],
)
async def test_times_of_release_1_0_lose_their_offset(
    tmp_path: Path, written: str, stored: str | None
) -> None:
    path = tmp_path / "events.db"
    assert await load(path, ROWS, f"1\ta\t{written}\n".encode()) == Loaded(1)
    assert execute(path, "SELECT received_at FROM rows") == [(stored,)]


async def test_a_new_column_has_its_default_in_rows_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    await load(path, ROWS, f"1\ta\t{AT}\n".encode())
    new = (
        Column("i", "bigint", "-5"),
        Column("f", "double precision", "1e-07"),
        Column("b", "boolean", "True"),
        Column("c", "boolean", "False"),
        Column("s", "text", "it's\n\\N"),
        Column("at", "timestamptz", "2026-01-02 03:04:05"),
        Column("o", "jsonb", '{"a": "it\'s"}'),
    )
    row = "\t".join(["2", "b", AT, *["\\N"] * len(new)])
    wider = Table("rows", (*ROWS.columns, *new))
    assert await load(path, wider, f"{row}\n".encode()) == Loaded(1)
    names = ", ".join(column.name for column in new)
    was, now = execute(path, f"SELECT {names} FROM rows ORDER BY n")
    assert was == (-5, 1e-07, 1, 0, "it's\n\\N", "2026-01-02 03:04:05", '{"a": "it\'s"}')
    assert now == (None,) * len(new)


# --- refused rows ---

TRIGGER = "CREATE TRIGGER no {when} INSERT ON rows WHEN NEW.t LIKE 'bad%' BEGIN {does}; END"
RAISED = TRIGGER.format(when="BEFORE", does="SELECT RAISE(ABORT, 'said no')")
REFUSALS = {
    "check": (
        "CREATE TABLE rows (n INTEGER, t TEXT CHECK (t NOT LIKE 'bad%'), received_at TEXT) STRICT",
        "SQLITE_CONSTRAINT_CHECK",
        None,
    ),
    "unique": (
        "CREATE TABLE rows (n INTEGER, t TEXT UNIQUE, received_at TEXT) STRICT;"
        "INSERT INTO rows VALUES (0, 'bad', '')",
        "SQLITE_CONSTRAINT_UNIQUE",
        "t",
    ),
    "foreign key": (
        "CREATE TABLE good (t TEXT PRIMARY KEY) STRICT; INSERT INTO good VALUES ('a');"
        "CREATE TABLE rows (n INTEGER, t TEXT REFERENCES good, received_at TEXT) STRICT",
        "SQLITE_CONSTRAINT_FOREIGNKEY",
        None,
    ),
    "type": (
        "CREATE TABLE rows (n INTEGER, t INTEGER, received_at TEXT) STRICT",
        "SQLITE_CONSTRAINT_DATATYPE",
        "t",
    ),
    "raised before": (
        f"CREATE TABLE rows (n INTEGER, t TEXT, received_at TEXT) STRICT; {RAISED}",
        "SQLITE_CONSTRAINT_TRIGGER",
        None,
    ),
    "raised after": (
        "CREATE TABLE rows (n INTEGER, t TEXT, received_at TEXT) STRICT;"
        f"{RAISED.replace('BEFORE', 'AFTER')}",
        "SQLITE_CONSTRAINT_TRIGGER",
        None,
    ),
    "malformed JSON": (  # an error of the expression: no constraint is named
        "CREATE TABLE rows (n INTEGER, t TEXT, received_at TEXT,"
        """ CHECK (json_extract(iif(t = 'bad', t, '"a"'), '$') = 'a')) STRICT""",
        "SQLITE_ERROR",
        None,
    ),
}
BAD = (0, 7, 8, 9, 511, 512, 1999)  # first, neighbours, last


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "PIECE_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("case", REFUSALS)
async def test_a_refused_row_is_found_exactly(tmp_path: Path, case: str) -> None:
    ddl, state, column = REFUSALS[case]
    path = tmp_path / "events.db"
    script(path, ddl)
    good = {"unique": "a{n}", "type": "{n}"}.get(case, "a")
    lines = [f"{n}\t{'bad' if n in BAD else good.format(n=n)}\t{AT}\n" for n in range(2000)]
    result = await load(path, ROWS, "".join(lines).encode())
    assert (result.loaded, result.dead) == (2000 - len(BAD), len(BAD))
    (loaded, least) = execute(path, "SELECT count(*), min(n) FROM rows WHERE n <> 0")[0]
    assert (loaded, least) == (2000 - len(BAD), 1)
    found = await letters(path)
    events = [json.loads(bytes(letter["event"])) for letter in found]
    assert [event["n"] for event in reversed(events)] == list(BAD)
    assert {(letter["sqlstate"], letter["column_name"]) for letter in found} == {(state, column)}


async def test_a_row_with_escapes_is_a_dead_letter_as_it_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    execute(path, "CREATE TABLE rows (n INTEGER CHECK (n > 0), t TEXT, received_at TEXT) STRICT")
    assert (await load(path, ROWS, f"0\ta\\tb\\\\\\n\t{AT}\n".encode())).dead == 1
    (letter,) = await letters(path)
    assert json.loads(bytes(letter["event"]))["t"] == "a\tb\\\n"


@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE TABLE rows (n INTEGER UNIQUE ON CONFLICT ROLLBACK, t TEXT, received_at TEXT)",
        "CREATE TABLE rows (n INTEGER, t TEXT, received_at TEXT);"
        "CREATE TRIGGER no BEFORE INSERT ON rows WHEN NEW.n = 1"
        " BEGIN SELECT RAISE(ROLLBACK, 'said no'); END",
    ],
)
async def test_a_table_that_rolls_back_more_than_the_row_is_blocked(
    tmp_path: Path, ddl: str
) -> None:
    """Else the rows before it would be lost, and the ledger with them."""
    path = tmp_path / "events.db"
    script(path, ddl)
    data = "".join(f"{n}\ta\t{AT}\n" for n in (0, 1, 1, 2)).encode()
    with pytest.raises(LaneBlocked, match="rolls back a whole transaction"):
        await load(path, ROWS, data)
    assert execute(path, "SELECT * FROM rows", "SELECT * FROM datapipe_ledger") == []
    assert await letters(path) == []


@pytest.mark.parametrize("when", ["BEFORE", "AFTER"])
async def test_a_row_that_the_table_keeps_is_not_called_refused(tmp_path: Path, when: str) -> None:
    """It would be there and be a dead letter: after a replay, twice."""
    path = tmp_path / "events.db"
    trigger = TRIGGER.format(when=when, does="SELECT RAISE(FAIL, 'said no')")
    script(path, f"CREATE TABLE rows (n INTEGER, t TEXT, received_at TEXT); {trigger}")
    data = "".join(f"{n}\t{t}\t{AT}\n" for n, t in enumerate(("a", "bad", "a"))).encode()
    if when == "BEFORE":  # it is not there yet
        assert (await load(path, ROWS, data)).dead == 1
    else:
        with pytest.raises(LaneBlocked, match="keeps a row that it refuses"):
            await load(path, ROWS, data)
    kept = [] if when == "AFTER" else [(0,), (2,)]
    assert execute(path, "SELECT n FROM rows") == kept


async def test_a_key_that_is_checked_at_commit_blocks_the_lane(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    late = "REFERENCES good DEFERRABLE INITIALLY DEFERRED"
    execute(
        path,
        "CREATE TABLE good (t TEXT PRIMARY KEY)",
        f"CREATE TABLE rows (n INTEGER, t TEXT {late}, received_at TEXT)",
    )
    with pytest.raises(LaneBlocked, match="FOREIGN KEY"):
        await load(path, ROWS, f"1\ta\t{AT}\n".encode())
    assert execute(path, "SELECT * FROM rows", "SELECT * FROM datapipe_ledger") == []


async def test_what_is_wrong_with_the_table_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    execute(
        path,
        "CREATE TABLE rows (n INTEGER, t TEXT, received_at TEXT)",
        "CREATE TRIGGER t AFTER INSERT ON rows BEGIN INSERT INTO gone VALUES (1); END",
    )
    with pytest.raises(LaneBlocked, match="gone"):
        await load(path, ROWS, f"1\ta\t{AT}\n".encode(), accept_dead=True)
    assert await letters(path) == []


@pytest.mark.parametrize(("type", "held"), [("TEXT", "1"), ("ANY", 1)])
async def test_a_number_is_one_unless_its_column_holds_text(
    tmp_path: Path, type: str, held: str | int
) -> None:
    path = tmp_path / "events.db"
    execute(path, f"CREATE TABLE rows (n {type}, t ANY, received_at TEXT) STRICT")
    assert await load(path, ROWS, f"1\t007\t{AT}\n".encode()) == Loaded(1)
    assert execute(path, "SELECT n, t FROM rows") == [(held, "007")]
