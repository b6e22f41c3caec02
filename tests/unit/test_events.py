"""Event types: classes and their rows, which COPY must read back exactly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import ConfigError, EventRejected
from datapipe.events.limits import Limits
from datapipe.events.registry import Registry, load_registry
from datapipe.events.rows import neutral_time, with_offset
from datapipe.events.types import Column, Event, EventType
from datapipe.settings import Settings
from datapipe.sinks import Table, table_of
from datapipe.sinks.postgres.dialect import dialect
from datapipe.sinks.postgres.sink import PostgresPlugin

AT = "2026-11-22 12:00:00.123456"


class Note(Event):
    text: str
    more: str | None = None
    tags: list = []


class Everything(Event):
    count: int
    ratio: float
    text: str
    flag: bool
    at: datetime
    day: date
    price: Decimal
    key: UUID
    properties: dict
    tags: list
    maybe: int | None


def note(**values: object) -> bytes:
    return json.dumps({"event_name": "note", **values}).encode()


def unescape(row: bytes) -> list[str | None]:
    """A COPY row as PostgreSQL reads it."""
    plain = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    values = row.decode().removesuffix("\n").split("\t")
    return [
        None if value == "\\N" else re.sub(r"\\.", lambda found: plain[found[0]], value)
        for value in values
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
ODD = st.text(st.sampled_from('\t\n\r\\N."\x1d\x1e\x1fé\U0001f600 '), max_size=8)


@given(st.lists(st.tuples(TEXT | ODD, st.none() | TEXT | ODD), min_size=1, max_size=6))
def test_text_survives_whichever_way_the_rows_are_made(values: list[tuple[str, Any]]) -> None:
    kind = EventType("note", Note)
    objects = [note(text=text, more=more) for text, more in values]
    events = [Registry([kind]).one.decode(raw) for raw in objects]
    singly = [kind.look_closer(raw, AT) for raw in objects]
    together = kind.rows(events, AT)
    assert [unescape(row) for row in singly] == [[text, more, "[]", AT] for text, more in values]
    assert together is None or together == b"".join(singly)


def test_the_straight_way_is_taken_for_ordinary_text() -> None:
    """What falls back to the slow way on every body would be correct and useless."""
    kind = EventType("note", Note)
    events = [Registry([kind]).one.decode(note(text=text)) for text in ("a\tb\\N", "é\n\r")]
    assert kind.rows(events, AT) is not None


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"text": "x" * 2048}, None), ({"text": "x" * 2049}, 6), ({"text": "é" * 1025}, 6),
        ({"text": "x" * 1024, "more": "x" * 1022}, None),
        ({"text": "x" * 1024, "more": "x" * 1025}, 6), ({"text": "a\0"}, 5),
        ({"text": "", "tags": ["\0"]}, 5), ({"text": "", "tags": [{"\0": 1}]}, 5),
        ({"text": "", "tags": ["\\u0000"]}, None), ({"text": "", "tags": {}}, 5),
        ({"text": "", "more": 1}, 5), ({"more": ""}, 4),
    ],
)  # fmt: skip
def test_limits_and_wrong_values(values: dict[str, Any], code: int | None) -> None:
    kind = EventType("note", Note, input_max_len=2050 if "tags" in values else 2048)
    raw = json.dumps(values).encode()
    if code is None:
        kind = EventType("note", Note, input_max_len=2050)
        assert kind.look_closer(raw, AT)
        return
    with pytest.raises(EventRejected) as refused:
        kind.look_closer(raw, AT)
    assert refused.value.reason.code == code


class Tick(Event):
    """It has no field."""


def test_an_event_without_fields_is_a_row() -> None:
    kind = EventType("tick", Tick)
    events = [Registry([kind]).one.decode(b'{"event_name": "tick"}')] * 2
    assert kind.look_closer(b"{}", AT) == f"{AT}\n".encode()
    assert kind.rows(events, AT) == f"{AT}\n{AT}\n".encode()


class Word(Event):
    text: str


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_one_that_is_too_long_is_found_among_many(lengths: list[int]) -> None:
    kind = EventType("word", Word, input_max_len=10)
    decode = Registry([kind]).one.decode
    events = [decode(b'{"event_name": "word", "text": "%b"}' % (b"x" * each)) for each in lengths]
    together = kind.rows(events, AT)
    if max(lengths) > 10:
        assert together is None
    else:
        assert together == b"".join(b"%b\t%b\n" % (b"x" * each, AT.encode()) for each in lengths)


def test_numbers_in_json_columns_lose_nothing() -> None:
    row = EventType("note", Note).look_closer(
        b'{"text":"","tags":[1.10, 12345678901234567890]}', AT
    )
    assert unescape(row)[2] == "[1.10, 12345678901234567890]"


EVERYTHING = {
    "count": 1, "ratio": 1, "text": "x", "flag": True, "at": "2020-01-01T00:00:00", "price": 1.10,
    "day": "2020-01-01", "key": "12345678-1234-5678-1234-567812345678", "properties": {},
    "tags": [], "maybe": None,
}  # fmt: skip


def test_every_column_type() -> None:
    row = EventType("everything", Everything).look_closer(json.dumps(EVERYTHING).encode(), AT)
    assert unescape(row) == [
        "1", "1.0", "x", "True", "2020-01-01 00:00:00", "2020-01-01", "1.1",
        "12345678-1234-5678-1234-567812345678", "{}", "[]", None, AT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "1"), ("count", 2**63), ("ratio", "1"), ("text", 1), ("flag", 1), ("flag", None),
        ("at", "yesterday"), ("at", 0), ("at", "0001-01-01T00:00:00+23:00"), ("day", "2020-13-01"),
        ("price", "NaN"), ("price", "Infinity"), ("price", "1e131072"), ("price", True),
        ("key", "x"), ("properties", []), ("tags", None), ("maybe", "1"),
    ],
)  # fmt: skip
def test_the_message_names_the_key_and_the_type_wanted(key: str, value: Any) -> None:
    kind = EventType("everything", Everything)
    with pytest.raises(EventRejected) as refused:
        kind.look_closer(json.dumps(EVERYTHING | {key: value}).encode(), AT)
    assert refused.value.reason.code == 5
    wanted = next(field.wanted for field in kind.fields if field.name == key)
    assert refused.value.detail.startswith(f"{key}: must be {wanted}: ")


class Basket(Event):
    tags: list[str] = []
    counts: dict[str, int] = {}
    prices: list[dict[str, float]] = []
    seen: dict[str, list[datetime | None]] | None = None
    mixed: list[int | list[str] | dict[str, bool]] = []
    rest: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("key", "sent", "wrong"),
    [
        ("tags", ["a", "b"], None), ("tags", ["a", "b", "c", 1], "tags[3]: must be str"),
        ("tags", {}, "tags: must be list[str]"), ("tags", [None], "tags[0]: must be str"),
        ("tags", None, "tags: must be list[str]"), ("tags", "a", "tags: must be list[str]"),
        ("counts", {"a": 1, "b": 2**63 - 1}, None),
        ("counts", {"a": 1, "b c": "2"}, 'counts["b c"]: must be int (64 bits)'),
        ("counts", {"a": 2**63}, 'counts["a"]: must be int (64 bits)'),
        ("counts", {"a": 1.0}, 'counts["a"]: must be int (64 bits)'),
        ("counts", {"a": True}, 'counts["a"]: must be int (64 bits)'),
        ("counts", {"é" * 99: "x"}, f'counts["{"é" * 63}...]: must be int (64 bits)'),
        ("prices", [{}, {"a": 1, "b": 0.5}], None),
        ("prices", [{}, {"a": 1, "b": "1"}], 'prices[1]["b"]: must be float'),
        ("prices", [[]], "prices[0]: must be dict[str, float]"),
        ("seen", None, None),
        ("seen", {"a": ["2026-01-02", None, "2026-01-02 03:04+01"]}, None),
        ("seen", {"a": [None, "soon"]}, 'seen["a"][1]: must be datetime | None: ISO 8601, such as'),
        ("mixed", [1, ["a"], {"a": True}], None),
        ("mixed", [1, ["a", 2]], "mixed[1][1]: must be str"),
        ("mixed", ["a"], "mixed[0]: must be int | list[str] | dict[str, bool]"),
        ("rest", {"a": [1, {"b": None}]}, None),
    ],
)  # fmt: skip
def test_what_lists_and_dicts_hold_is_checked(key: str, sent: Any, wrong: str | None) -> None:
    kind = EventType("basket", Basket)
    event = json.dumps({"event_name": "basket", key: sent}).encode()
    decoded = Registry([kind]).one.decode(event)
    if wrong is None:
        row = kind.look_closer(event, AT)
        assert kind.rows([decoded], AT) == row
        place = list(Basket.__annotations__).index(key)
        assert json.loads(unescape(row)[place] or "null") == sent
        return
    for write in (lambda: kind.rows([decoded], AT), lambda: kind.look_closer(event, AT)):
        with pytest.raises(EventRejected) as refused:
            write()
        assert refused.value.reason.code == 5
        assert refused.value.detail.startswith(wrong)


def make(**fields: Any) -> type[Event]:
    hints = {name: hint for name, (hint, *_) in fields.items()}
    defaults = {name: rest[0] for name, (_, *rest) in fields.items() if rest}
    return type("Made", (Event,), {"__annotations__": hints, **defaults})


@pytest.mark.parametrize("name", ["", "X", "1a", "a-b", "a" * 49, "datapipe_x", "a b", "é"])
def test_names_that_are_no_event_types(name: str) -> None:
    with pytest.raises(ConfigError, match="event type"):
        EventType(name, Note)


@pytest.mark.parametrize(
    "fields",
    [
        {"received_at": (int,)}, {"event_name": (str,)}, {"xmin": (int,)}, {"a" * 64: (int,)},
        {"x": (bytes,)}, {"x": (int | str,)}, {"x": (int, "1")}, {"x": (int, None)},
        {"x": (str, "\0")}, {"x": (int, 2**63)}, {"x": (dict, {"a": "\0"})},
        {"x": (list[bytes],)}, {"x": (dict[int, str],)}, {"x": (list[list[set]],)},
        {"x": (list[int, str],)}, {"x": (dict[str],)}, {"x": (list[dict[str]],)},
        {"x": (list[datetime | str],)}, {"x": (dict[str, list[int] | list[str]],)},
        {"x": (list[int], ["a"])}, {"x": (Any,)},
    ],
)  # fmt: skip
def test_fields_that_are_no_columns(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="field"):
        EventType("made", make(**fields))


# --- what another database can't hold ---

NARROW = Limits(
    whole_digits=3, decimal_digits=2, beyond_years=False, json_depth=2, name_bytes=12,
    reserved=frozenset({"row_id"}), reserved_tables=("own_",), last_character="\uffff",
    ignores_case=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("price", "999.99", True), ("price", "-999.99", True), ("price", "1000", False),
        ("price", "0.001", False), ("price", "1e3", False), ("price", "1e2", True),
        ("price", "0", True), ("price", "1e-2", True), ("price", "1e-3", False),
        ("at", "0001-01-01T00:00:00Z", True), ("at", "0001-01-01T00:00:00-08:00", True),
        ("at", "0001-01-01T00:00:00+02:30", False), ("at", "9999-12-31T23:59:59-08:00", False),
        ("at", "9999-12-31T23:59:59.999999", True),
        ("tags", [[]], True), ("tags", [[1, "[[["]], True), ("tags", [[[]]], False),
        ("tags", [1, {"a": 1}, {"b": 2}, [], []], True), ("tags", [1, {"a": [{}]}], False),
        ("properties", {"a": {"b": 1}}, True), ("properties", {"a": {"b": []}}, False),
    ],
)  # fmt: skip
def test_what_the_database_can_not_hold_is_refused(key: str, value: Any, fits: bool) -> None:
    """Here alone: it would be rounded, or cut, or be a dead letter, later."""
    kind = EventType("everything", Everything, limits=replace(NARROW, name_bytes=63))
    raw = json.dumps(EVERYTHING | {key: value, "event_name": "everything"}).encode()
    event = Registry([kind]).one.decode(raw)
    if fits:
        assert kind.rows([event], AT) == kind.look_closer(raw, AT)
        return
    for write in (lambda: kind.rows([event], AT), lambda: kind.look_closer(raw, AT)):
        with pytest.raises(EventRejected) as refused:
            write()
        assert refused.value.reason.code == 5
        assert refused.value.detail.startswith(f"{key}: ")
    assert EventType("everything", Everything).look_closer(raw, AT)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Row_Id": (int,)}, "'Row_Id': this name is reserved"),
        ({"Received_At": (int,)}, "'Received_At': .* in case alone"),
        ({"user": (int,), "User": (int,)}, "'User': .* in case alone"),
        ({"i": (int,), "\u0130": (int,)}, "in case alone"),
        ({"a" * 13: (int,)}, "longer than 12 bytes"),
        ({"\U00020000": (int,)}, "can't be in the name"),
        ({"x": (list, [[[]]])}, "'x': default: nested too deep"),
        ({"x": (Decimal, Decimal(1000))}, "'x': default"),
    ],
)
def test_what_the_database_can_not_have_as_a_column(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EventType("made", make(**fields), limits=NARROW)
    EventType("made", make(**fields))
    with pytest.raises(ConfigError, match="datapipe_ or own_"):
        EventType("own_made", Note, limits=NARROW)


def test_types_are_held_to_the_limits_of_the_sink_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    types = {"made": {"price": "Decimal", "user": "int", "User": "int"}}
    assert "made" in load_registry(Settings(events=types)).types
    monkeypatch.setattr(PostgresPlugin, "limits", NARROW)
    with pytest.raises(ConfigError, match=r"events\.made: .*in case alone"):
        load_registry(Settings(events=types))
    del types["made"]["User"]
    kind = load_registry(Settings(events=types)).types["made"]
    with pytest.raises(EventRejected, match="price"):
        kind.look_closer(b'{"price": 1000, "user": 1}', AT)


def test_defaults_become_column_defaults() -> None:
    at = datetime.fromisoformat("2026-01-02T03:04:05+02:30")
    kind = EventType(
        "made",
        make(a=(str, "it's"), b=(dict, {"x": [1]}), c=(int | None, None), d=(datetime, at)),
    )
    assert [column.default for column in kind.columns] == [
        "it's", '{"x":[1]}', None, "2026-01-02 00:34:05", None,
    ]  # fmt: skip
    assert (
        dialect("s")
        .script([table_of(kind)])
        .endswith(
            """
    "a" text DEFAULT 'it''s'::text,
    "b" jsonb DEFAULT '{"x":[1]}'::jsonb,
    "c" bigint,
    "d" timestamptz DEFAULT '2026-01-02 00:34:05+00:00'::timestamptz,
    "received_at" timestamptz
);

COMMENT ON TABLE "s"."made" IS 'kept by datapipe';

"""
        )
    )
    row = ["it's", '{"x":[1]}', None, "2026-01-02 00:34:05", AT]
    assert unescape(kind.look_closer(b"{}", AT)) == row


def test_the_ddl_of_what_is_kept() -> None:
    table = Table("made", (Column("received_at", "timestamptz"),), retention_s=1)
    made, index, comment = dialect("s").create(table)
    assert made.endswith('"received_at" timestamptz\n)')
    assert index == 'CREATE INDEX ON "s"."made" (received_at)'
    partitioned = dialect("s").create(replace(table, partition="day"))
    assert partitioned == [f"{made} PARTITION BY RANGE (received_at)", comment]


class Log(Event):
    text: str = "it's \\N \t"


def test_a_default_is_escaped_though_the_body_holds_nothing_to_escape() -> None:
    kind = EventType("log", Log)
    events = Registry([kind]).many.decode(b'[{"event_name":"log"},{"event_name":"log","text":"x"}]')
    row, other = (kind.rows(events, AT, plain=True) or b"").splitlines()
    assert unescape(row) == ["it's \\N \t", AT]
    assert unescape(other) == ["x", AT]


def test_white_space_in_json_is_escaped_though_the_body_holds_nothing_to_escape() -> None:
    kind = EventType("note", Note)
    event = Registry([kind]).one.decode(b'{"event_name":"note","text":"x","tags":[1,\n\t2]}')
    row = kind.rows([event], AT, plain=True) or b""
    assert unescape(row) == ["x", None, "[1,\n\t2]", AT]


class Moment(Event):
    at: datetime


@pytest.mark.parametrize(
    ("sent", "row"),
    [
        ("2026-11-25T12:00:00Z", "2026-11-25 12:00:00"),
        ("2026-11-25T12:00:00", "2026-11-25 12:00:00"),
        ("2026-11-25T12:00:00.123456+02:30", "2026-11-25 09:30:00.123456"),
        ("2026-11-25T20:00:00-08:00", "2026-11-26 04:00:00"),
        ("2026-11-25T12:00:00+23:59", "2026-11-24 12:01:00"),
        ("0001-01-01T00:00:00-08:00", "0001-01-01 08:00:00"),
        ("0001-01-01T00:00:00+02:30", "0001-01-01 00:00:00+02:30"),  # before the year 1 in UTC
        ("9999-12-31T23:59:59-08:00", "9999-12-31 23:59:59-08:00"),
    ],
)
def test_times_in_rows_are_in_utc_without_an_offset(sent: str, row: str) -> None:
    kind = EventType("moment", Moment)
    closer = kind.look_closer(json.dumps({"at": sent}).encode(), AT)
    assert unescape(closer) == [row, AT]
    raw = json.dumps({"event_name": "moment", "at": sent}).encode()
    assert kind.rows([Registry([kind]).one.decode(raw)], AT, plain=True) == closer
    assert neutral_time(sent) == row
    shown = with_offset(row)
    assert shown == (row if len(row) > 19 and row[19] in "+-" else f"{row}+00:00")
    assert neutral_time(shown) == row


@pytest.mark.parametrize(
    ("sent", "row"),
    [
        ("2026-11-25", "2026-11-25 00:00:00"),
        ("2026-11-25T12:30", "2026-11-25 12:30:00"),
        ("2026-11-25 12:30Z", "2026-11-25 12:30:00"),
        ("2026-11-25t12:30+02:30", "2026-11-25 10:00:00"),
        ("2026-11-25 12:30-0800", "2026-11-25 20:30:00"),
        ("2026-11-25 12:30:05.25+02", "2026-11-25 10:30:05.250000"),
        ("0001-01-01T00:00+02:30", "0001-01-01 00:00:00+02:30"),
        ("2026-02-30", None), ("2026-11-25T24:00", None), ("2026-11-25Z", None), ("", None),
        ("2026-11-25T12", None), ("2026-W48-3", None), ("20261125", None), (" 2026-11-25", None),
        ("2026-11-25T12:30+99", None), ("\u0662026-11-25", None),
    ],
)  # fmt: skip
def test_times_that_are_shorter_than_rfc_3339_has_them(sent: str, row: str | None) -> None:
    """The fast way does not know them, so they are for those who look closer."""
    kind = EventType("moment", Moment)
    raw = json.dumps({"event_name": "moment", "at": sent}).encode()
    with pytest.raises(msgspec.ValidationError):
        Registry([kind]).one.decode(raw)
    if row is None:
        with pytest.raises(EventRejected, match="at: must be datetime"):
            kind.look_closer(raw, AT)
    else:
        assert unescape(kind.look_closer(raw, AT)) == [row, AT]
