"""Which event types the page shows: what is unwell or busy first, a bounded part, by search."""

from __future__ import annotations

from typing import Any

import pytest

from datapipe.monitor.overview import NAMES, ROWS, UNFOLDED, Overview, View, overview


def lane(**changes: Any) -> dict[str, Any]:
    """One that is idle and well."""
    well = {"state": "empty", "error": None, "full": False, "slow_load": None, "balanced": True,
            "idle": True, "waiting": 0, "oldest_seconds": 0.0, "accepted_per_second": 0.0,
            "loaded_per_second": 0.0}  # fmt: skip
    return well | changes


BUSY = lane(idle=False)
BLOCKED = lane(state="blocked")


def many(count: int, of: dict[str, Any], first: str = "a") -> dict[str, dict[str, Any]]:
    return {f"{first}_{number:05d}": of for number in range(count)}


def shown(lanes: dict[str, dict[str, Any]], **view: str) -> Overview:
    return overview(lanes, View(**view))


def counts(found: Overview) -> tuple[int, int, int, int]:
    return len(found.rows), found.idle_count, found.left_out, found.matching


@pytest.mark.parametrize(
    "trouble",
    [
        {"state": "blocked"}, {"state": "retrying"}, {"error": "a lock"}, {"full": True},
        {"slow_load": {"seconds": 11.0, "waits_for": None}}, {"balanced": False},
    ],
    ids=lambda trouble: next(iter(trouble)) + str(trouble.get("state", "")),
)  # fmt: skip
def test_unwell_comes_first_then_busy_and_idle_is_folded(trouble: dict[str, Any]) -> None:
    lanes = many(40, lane()) | {"b": BUSY, "c": BUSY, "z": lane(**trouble)}
    found = shown(lanes)
    assert list(found.rows) == ["z", "b", "c"]
    assert list(found.idle) == sorted(many(40, lane()))
    assert counts(found) == (3, 40, 0, 43)


def test_what_a_person_must_see_to_comes_before_what_is_tried_again() -> None:
    lanes = many(100, lane(state="retrying")) | {"x": BUSY, "y": lane(full=True), "z": BLOCKED}
    assert list(shown(lanes).rows)[:3] == ["y", "z", "a_00000"]


def test_few_types_are_not_folded() -> None:
    few = many(UNFOLDED - 1, lane()) | {"z": BUSY}
    assert list(shown(few).rows) == ["z", *sorted(many(UNFOLDED - 1, lane()))]
    assert shown(few).idle_count == 0
    assert shown(few | {"y": lane()}).idle_count == UNFOLDED


def test_however_many_there_are_what_is_shown_is_bounded() -> None:
    lanes = many(500, lane()) | many(400, BUSY, "b") | many(100, BLOCKED, "c")
    found = shown(lanes)
    assert list(found.rows) == sorted(many(ROWS, BLOCKED, "c"))
    assert len(found.idle) == NAMES
    assert counts(found) == (ROWS, 500, 450, 1000)
    assert (found.blocked, found.blocked_rows) == (100, ROWS)
    assert found.total == 1000


def test_search_is_by_a_part_of_the_name_or_the_state_and_folds_nothing() -> None:
    lanes = many(100, lane(), "page_view") | {"blocked_users": lane(), "a": BLOCKED, "b": BUSY}
    assert list(shown(lanes, q="Page View_00007").rows) == ["page_view_00007"]
    assert list(shown(lanes, q="blocked").rows) == ["a", "blocked_users"]
    assert list(shown(lanes | {"f": lane(full=True)}, q="full").rows) == ["f"]
    assert counts(shown(lanes, q="view")) == (ROWS, 0, 50, 100)
    assert counts(shown(lanes, q="nonesuch")) == (0, 0, 0, 0)


def test_the_open_row_is_shown_wherever_it_stands() -> None:
    lanes = many(100, lane()) | many(100, BUSY, "b")
    assert "a_00007" in shown(lanes, type="a_00007").rows
    assert "a_00007" not in shown(lanes, type="a_00007").idle
    assert shown(lanes, type="a_00007").idle_count == 99
    last = shown(lanes, type="b_00099")
    assert list(last.rows)[-1] == "b_00099"
    assert counts(last) == (ROWS, 100, 50, 200)
    assert "a_00007" not in shown(lanes, type="a_00007", q="b_").rows
    assert counts(shown(lanes, type="nonesuch")) == counts(shown(lanes))
    assert shown(lanes, type="nonesuch", q="nonesuch").rows == {}


@pytest.mark.parametrize(
    ("sort", "key"),
    [
        ("waiting", "waiting"), ("oldest", "oldest_seconds"),
        ("accepted", "accepted_per_second"), ("loaded", "loaded_per_second"),
    ],
)  # fmt: skip
def test_order_is_by_the_most_then_by_name(sort: str, key: str) -> None:
    lanes = {"a": BUSY | {key: 1}, "d": BUSY | {key: 2}, "c": BUSY | {key: 2}, "b": BLOCKED}
    assert list(shown(lanes, sort=sort).rows) == ["c", "d", "a", "b"]
    assert list(shown(lanes, sort="name").rows) == ["a", "b", "c", "d"]
    assert list(shown(lanes).rows) == ["b", "a", "c", "d"]


def test_a_view_is_what_the_address_says_and_nonsense_is_not_said() -> None:
    assert View.of({}) == View()
    query = {"q": f" {'x' * 100}", "sort": "nonesuch", "type": "a", "sections": ""}
    assert View.of(query) == View("x" * 60, "", "a")
    view = View.of({"q": 'a&b="c"', "sort": "waiting"})
    assert view.link() == "?q=a%26b%3D%22c%22&sort=waiting"
    assert view.link(q="", type="d") == "?sort=waiting&type=d"
    assert View().link() == "./"
