from __future__ import annotations

import re
from typing import Any

import pytest

from datapipe.monitor import formats
from datapipe.monitor.summary import Summary

GIB = 1024**3
LANE = {
    "waiting": 7, "full": False, "blocked": None, "error": None, "slow_load": None,
    "next_load_seconds": 1.9,
}  # fmt: skip


def status(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "books": {"waiting": 1204, "balanced": True},
        "lanes": {"install": dict(LANE)},
        "mirror": {
            "up": True,
            "bytes": 0,
            "max_bytes": GIB,
            "seconds_left": None,
            "left_messages": 0,
            "left_seconds": None,
        },
        "database": {"up": True, "error": None},
    }
    for path, value in changes.items():
        part, _, key = path.partition("__")
        told[part][key] = value
    return told


def test_healthy() -> None:
    told = Summary().of(status(), None)
    text = "Healthy. 1,204 events waiting to be loaded, the next in 2 s."
    assert told == {"state": "healthy", "text": text, "since": None, "also": []}
    assert "balance" in Summary().of(status(books__waiting=0), None)["text"]


def test_database_down_tells_since_when_why_and_for_how_long_there_is_room() -> None:
    down = status(
        database__up=False, database__error="connection refused", mirror__seconds_left=10_900
    )
    told = Summary().of(down, None)
    assert told["state"] == "database_down"
    assert re.match(
        r"PostgreSQL does not answer since \d\d:\d\d UTC: connection refused\. Events are kept, "
        r"1,204 waiting, room for about 3 h at this rate\. \w+",
        told["text"],
    )


def test_since_stays_while_it_lasts_and_is_new_the_next_time() -> None:
    summary = Summary()
    down = status(database__up=False, database__error="x")
    first = summary.of(down, None)["since"]
    assert summary.of(down | {"books": {"waiting": 9, "balanced": True}}, None)["since"] == first
    assert summary.of(status(), None)["since"] is None
    assert summary._since == {}


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"books__balanced": False}, "unbalanced"),
        ({"mirror__bytes": GIB - 1}, "nearly_full"),
        ({"database__up": False}, "starting"),
        ({"mirror__left_messages": 20, "mirror__left_seconds": 60}, "recovering"),
        ({"lanes__install": LANE | {"blocked": "no column x"}}, "lane_blocked"),
        ({"lanes__install": LANE | {"error": "a lock"}}, "lane_failing"),
        ({"lanes__install": LANE | {"slow_load": {"waits_for": None}}}, "lane_slow"),
        ({"lanes__install": LANE | {"slow_load": {"waits_for": "IO: WALSync"}}}, "lane_slow"),
    ],
)
def test_states(changes: dict[str, Any], state: str) -> None:
    told = Summary().of(status(**changes), None)
    assert (told["state"], told["also"]) == (state, [])
    assert told["text"].endswith(".")


def test_the_worst_comes_first_and_the_rest_is_told_too() -> None:
    changes = {"database__up": False, "database__error": "x", "mirror__bytes": GIB}
    told = Summary().of(status(**changes), "the mirror is full")
    assert told["state"] == "refusing"
    assert len(told["also"]) == 1
    assert told["also"][0].startswith("PostgreSQL does not answer")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.004, "4 ms"), (3.14, "3.1 s"), (75, "1 min 15 s"), (7500, "2 h 5 min"),
     (3599.7, "1 h 0 min"), (200_000, "2 d 7 h"), (None, "\N{EN DASH}")],
)  # fmt: skip
def test_seconds(value: float | None, text: str) -> None:
    assert formats.seconds(value) == text


def test_other_formats() -> None:
    assert [formats.size(n) for n in (0, 1023, 1536, 1024**2 - 1, 3 * GIB)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "3.0 GiB",
    ]  # fmt: skip
    assert [formats.rate(n) for n in (0.0, 0.4, 12.34, 1204.0)] == ["0", "0.4", "12.3", "1,204"]
    assert [formats.roughly(n) for n in (60, 600, 10_900, 500_000)] == [
        "60 s", "10 min", "3 h", "6 days",
    ]  # fmt: skip
    assert formats.clock("2001-02-03T04:05:06.789Z") == "2001-02-03 04:05"
