from __future__ import annotations

from datapipe.monitor.aggregate import together_series
from datapipe.monitor.history import POINTS, STEP_S, History, Reading


def test_points_are_rates_and_the_highest_depth() -> None:
    history = History(0.0)
    for second in range(1, 11):
        waiting = 7 if second == 3 else 0
        history.take(float(second), {"a": Reading(10 * second, 5 * second, waiting)})
    series = dict(history.series())["a"]
    assert series == {"accepted": [10.0, 10.0], "loaded": [5.0, 5.0], "waiting": [7, 0]}
    assert history.closed == 2
    assert history.rates("a") == (10.0, 5.0)


def test_a_younger_lane_has_fewer_points_and_counts_in_the_total() -> None:
    history = History(0.0)
    history.take(5.0, {"a": Reading(5, 0, 5)})
    history.take(10.0, {"a": Reading(5, 0, 5), "b": Reading(50, 50, 0)})
    series = together_series([dict(history.series())], shared=False)
    assert series["lanes"]["b"]["accepted"] == [10.0]
    assert series["total"]["accepted"] == [1.0, 10.0]
    assert series["total"]["waiting"] == [5, 5]


def test_memory_is_bounded() -> None:
    history = History(0.0)
    for second in range(2000):
        history.take(float(second), {"a": Reading(second, second, 0)})
    assert len(dict(history.series())["a"]["accepted"]) == POINTS


def test_a_pause_leaves_no_gap() -> None:
    history = History(0.0)
    history.take(4 * STEP_S, {"a": Reading(200, 0, 0)})
    assert dict(history.series())["a"]["accepted"] == [10.0] * 4
    history.take(1e6, {"a": Reading(200, 0, 0)})
    assert len(dict(history.series())["a"]["accepted"]) == POINTS


def test_idle_is_what_nothing_has_happened_to_for_as_long_as_the_charts_show() -> None:
    history, whole = History(0.0), POINTS * STEP_S
    assert history.idle("nonesuch")
    nothing = {name: Reading(0, 0, 0) for name in ("a", "b", "c")}
    history.take(1.0, nothing)
    assert [history.idle(name) for name in nothing] == [True] * 3
    # one is accepted and loaded, one waits, one came from the mirror and waited from the start
    then = {"a": Reading(1, 1, 0), "b": Reading(0, 0, 1), "d": Reading(0, 0, 1)}
    history.take(2.0, nothing | then)
    later = then | {"d": Reading(0, 1, 0)}
    history.take(2.0 + whole - 1, nothing | later)
    assert [history.idle(name) for name in "abcd"] == [False, False, True, False]
    history.take(2.0 + whole, nothing | later)
    assert [history.idle(name) for name in "abcd"] == [True, False, True, False]


def test_rates_of_a_lane_that_is_not_known() -> None:
    assert History(0.0).rates("nonesuch") == (0.0, 0.0)


def test_several_processes_are_added_at_the_newest_point() -> None:
    one, two = History(0.0), History(0.0)
    one.take(5.0, {"a": Reading(5, 0, 5)})
    one.take(10.0, {"a": Reading(10, 0, 10)})
    two.take(5.0, {"a": Reading(50, 0, 50), "b": Reading(0, 0, 1)})
    series = together_series([dict(one.series()), dict(two.series())], shared=False)
    assert series["lanes"]["a"]["accepted"] == [1.0, 11.0]
    assert series["total"]["waiting"] == [5, 61]
    assert together_series([{}], shared=False)["total"] == {
        "accepted": [],
        "loaded": [],
        "waiting": [],
    }
