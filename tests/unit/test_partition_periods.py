"""Periods of partitions, and what is left of them between those that are there."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from itertools import pairwise

import pytest

from datapipe.sinks.postgres.partitions import AHEAD, Partition, ahead, gap, period


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("partition", "time", "start", "end"),
    [
        ("day", "2026-11-26 00:00", "2026-11-26", "2026-11-27"),
        ("day", "2024-02-29 23:59:59.999999", "2024-02-29", "2024-03-01"),
        ("week", "2026-11-26 12:00", "2026-11-23", "2026-11-30"),
        ("week", "2026-11-23 00:00", "2026-11-23", "2026-11-30"),
        ("week", "2027-01-03 23:59", "2026-12-28", "2027-01-04"),
        ("month", "2026-12-31 23:59", "2026-12-01", "2027-01-01"),
        ("month", "2024-02-01 00:00", "2024-02-01", "2024-03-01"),
    ],
)
def test_periods(partition: str, time: str, start: str, end: str) -> None:
    assert period(partition, at(time)) == (at(start), at(end))


@pytest.mark.parametrize("partition", ["day", "week", "month"])
def test_those_ahead_follow_each_other(partition: str) -> None:
    begins = ahead(partition, at("2026-12-30 13:00"))
    assert len(begins) == AHEAD + 1
    assert begins[0] <= at("2026-12-30 13:00")
    for begin, following in pairwise(begins):
        assert period(partition, begin) == (begin, following)


def there(start: float, end: float) -> Partition:
    return Partition("public", "x", True, start, end)


def test_what_others_hold_is_left_to_them() -> None:
    days = [
        there(-math.inf, at("2026-10-01")),
        there(at("2026-11-05"), at("2026-11-06")),
        there(at("2026-11-09 12:34"), math.inf),
    ]
    assert gap(days, "month", at("2026-11-01")) == (at("2026-11-01"), at("2026-11-05"))
    assert gap(days, "month", at("2026-11-06")) == (at("2026-11-06"), at("2026-11-09 12:34"))
    assert gap(days, "week", at("2026-11-09 12:33")) == (at("2026-11-09"), at("2026-11-09 12:34"))
    assert gap(days, "day", at("2026-10-01")) == (at("2026-10-01"), at("2026-10-02"))
    for held in ("2020-01-01", "2026-11-05", "2026-11-09 12:34", "2030-01-01"):
        assert gap(days, "month", at(held)) is None
