"""The declaration that is offered for unknown events fits what was seen."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.events.fitting import fitting
from datapipe.events.registry import declared_class
from datapipe.events.types import EventType

_UUID = "7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ("1, -5", "int"),
        ("1, 1.0", "float"),
        ("1.5, null", "float?"),
        ("1, 9223372036854775808", "Decimal"),
        ("1.5, 1e999", "Decimal"),
        ("true, false", "bool"),
        ("true, 1", None),
        ('"a", ""', "str"),
        ('"a", 1', None),
        ('"2026-01-02", "2026-12-31"', "date"),
        ('"2026-02-31", "2026-12-31"', "str"),
        ('"2026-01-02", "2026-01-02 10:00"', "datetime"),
        ('"2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123+02:00"', "datetime"),
        ('"2026-01-02T03:04:05Z", "soon"', "str"),
        (f'"{_UUID}"', "UUID"),
        (f'"{_UUID}", "{_UUID.replace("-", "")}"', "str"),
        ("{}, {}", "dict"),
        ("[], [1]", "list"),
        ("[], {}", None),
        ("null, null", "str?"),
    ],
)
def test_the_narrowest_type_that_all_have(values: str, kind: str | None) -> None:
    events = [f'{{"event_name": "e", "k": {value}}}' for value in msgspec.json.decode(
        f"[{values}]", type=list[msgspec.Raw]
    ) for value in [bytes(value).decode()]]  # fmt: skip
    assert fitting(events) == ({} if kind is None else {"k": kind})


def test_what_is_missing_in_some_may_be_null() -> None:
    assert fitting(['{"a": 1, "b": 2}', '{"a": 1}']) == {"a": "int", "b": "int?"}


def test_what_can_be_no_column_is_left_out() -> None:
    event = {"event_name": "e", "received_at": 1, "a b": 1, "__x": 1, "ctid": 1, "x" * 64: 1}
    assert fitting([json.dumps({**event, "class": 1})]) == {"class": "int"}


def test_what_can_not_be_read_is_passed_over() -> None:
    digits = "1" * 5000
    assert fitting(['{"a": 1}', f'{{"b": {digits}}}']) == {"a": "int"}
    assert fitting([]) == {}


def test_there_are_no_more_than_a_table_has_use_for() -> None:
    events = [json.dumps({f"k{n}": 1 for n in range(1000)}), '{"k999": 1}']
    fields = fitting(events)
    assert len(fields) == 200
    assert next(iter(fields.items())) == ("k999", "int")


_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text("a-0:T Z.\u00e9", max_size=8), st.dates().map(str), st.datetimes().map(str),
    st.uuids().map(str),
)  # fmt: skip
_values = st.one_of(_leaves, st.lists(_leaves, max_size=2), st.just({"x": [{}]}))


@settings(deadline=None)  # others use the machine, too
@given(st.lists(st.dictionaries(st.sampled_from("abcd"), _values), min_size=1, max_size=3))
def test_each_event_that_was_seen_fits(events: list[dict[str, Any]]) -> None:
    sent = [json.dumps({"event_name": "e", **event}) for event in events]
    kind = EventType("e", declared_class("e", fitting(sent)))
    for event in sent:
        kind.look_closer(event.encode(), "2026-01-01 00:00:00")
