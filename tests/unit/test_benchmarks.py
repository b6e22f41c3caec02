"""How the benchmark compares, judges and tells."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import structlog

from benchmarks import batch, databases, ironmq, keys, memory, nats, page, send, single, steady
from benchmarks.chart import Bar, Group, svg
from benchmarks.limits import LIMITS
from benchmarks.measure import (
    Bench,
    Contest,
    Goal,
    Sample,
    Spread,
    in_turn,
    memory_goals,
    percentile,
)
from benchmarks.page import Part
from benchmarks.results import Result, read, save
from benchmarks.stores import STORES, SqliteStore
from datapipe.sinks.transactional import TransactionalSink

_SINGLE = Part("single", "Single events", "One event a POST.")
_BATCH = Part("batch", "Batches", "Many events a POST.")


def _bench(runs: int = 3) -> Bench:
    return Bench(None, runs, 1, 1, lambda text: None)


def _contest(goal: Goal, ours: float = 200.0, theirs: float = 100.0) -> Contest:
    samples = {"datapipe": [{"rate": ours}], "a | b": [{"rate": theirs}]}
    return Contest("64 connections", samples, [goal])


def _goal(least: float, what: str = "datapipe / b") -> Goal:
    return Goal(what, "datapipe", "a | b", least=least)


def test_rivals_take_turns_and_each_ratio_is_of_one_turn() -> None:
    order: list[str] = []

    def rival(name: str, *rates: float) -> Callable[[], Sample]:
        left = iter(rates)

        def run() -> Sample:
            order.append(name)
            return {"rate": next(left)}

        return run

    rivals = {"datapipe": rival("datapipe", 10, 90, 40), "peer": rival("peer", 10, 30, 20)}
    contest = in_turn("", rivals, _bench())
    assert order == ["datapipe", "peer"] * 3
    assert contest.ratio("datapipe", "peer") == Spread(2, 1, 3)
    assert contest.spread("datapipe", "rate") == Spread(40, 10, 90)
    assert contest.spread("datapipe", "p99_ms") is None


def test_a_rival_that_fails_is_left_out_and_the_first_is_not() -> None:
    def fails() -> Sample:
        raise OSError("not installed\nmore")

    goal = Goal("", "datapipe", "peer", least=1)
    contest = in_turn("", {"datapipe": lambda: {"rate": 1}, "peer": fails}, _bench(), [goal])
    assert contest.left_out == {"peer": "run 1: not installed"}
    assert list(contest.samples) == ["datapipe"]
    assert contest.judge(goal) is None
    with pytest.raises(OSError, match="not installed"):
        in_turn("", {"datapipe": fails}, _bench())


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("", "", least=5), True),
        (Goal("", "", least=5.1), False),
        (Goal("", "", least=5, every=True), False),
        (Goal("", "", most=5), True),
        (Goal("", "", most=4.9), False),
        (Goal("", "", most=8, every=True), False),
    ],
)
def test_a_goal_is_met_by_the_median_or_by_every_run(goal: Goal, met: bool) -> None:
    assert goal.met(Spread(5, 1, 9)) is met


@pytest.mark.parametrize(
    ("share", "value"),
    [(0.05, 0.005), (0.1, 0.01), (0.5, 0.02), (0.8, 0.02875), (0.9, 0.03), (0.95, 0.03)],
)
def test_a_percentile_lies_within_its_bucket(share: float, value: float) -> None:
    buckets = {0.01: 10, 0.02: 50, 0.025: 50, 0.03: 90, float("inf"): 100}
    assert percentile(buckets, share) == pytest.approx(value)
    assert percentile(dict.fromkeys(buckets, 0), share) is None


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    assert read(tmp_path, "single") is None
    result = Result("a machine", "5 runs", [_contest(_goal(1))])
    save(tmp_path, "single", result)
    assert read(tmp_path, "single") == result


def _write(folder: Path, **contests: Contest) -> str:
    results = {name: Result("2 cores", "today", [of]) for name, of in contests.items()}
    page.write(folder / "benchmarks.md", [_SINGLE, _BATCH], results)
    return (folder / "benchmarks.md").read_text()


def test_a_part_that_is_measured_alone_replaces_its_own_section_only(tmp_path: Path) -> None:
    first = _write(tmp_path, single=_contest(_goal(1)), batch=_contest(_goal(3, "batch / b")))
    assert "| [Single events](#single-events) | datapipe / b | >= 1 | 2.00 | met |\n" in first
    assert "| [Batches](#batches) | batch / b | >= 3 | 2.00 | **MISSED** |\n" in first
    assert "| a \\| b | 100 | 2.00 |\n" in first
    again = _write(tmp_path, batch=_contest(_goal(3, "batch / b"), ours=1234))
    pairs = zip(first.splitlines(), again.splitlines(), strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == [
        (
            "| [Batches](#batches) | batch / b | >= 3 | 2.00 | **MISSED** |",
            "| [Batches](#batches) | batch / b | >= 3 | 12.34 | met |",
        ),
        ("| datapipe | 200 |  |", "| datapipe | 1,234 |  |"),
        ("| a \\| b | 100 | 2.00 |", "| a \\| b | 100 | 12.34 |"),
    ]
    assert (tmp_path / "benchmarks-single.svg").exists()


def test_a_missed_goal_says_what_holds_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(page.LIMITS, "datapipe / b", "the disk")
    assert "| 2.00 | **MISSED**: the disk |" in _write(tmp_path, single=_contest(_goal(9)))
    assert "the disk" not in _write(tmp_path, single=_contest(_goal(1)))


def test_limits_are_those_of_goals_that_there_are() -> None:
    goals = [goal for part in (batch, keys, memory, send, steady) for goal in part.goals()]
    goals += [goal for connections in single.CONNECTIONS for goal in single.goals(connections)]
    goals += [goal for connections in nats.CONNECTIONS for goal in nats.goals(connections)]
    goals += nats.batch_goals() + [goal for name in nats.SYNC for goal in nats.process_goals(name)]
    goals += ironmq.single_goals() + databases.batch_goals() + databases.delay_goals()
    goals += [goal for store in STORES for goal in databases.load_goals(store)]
    assert LIMITS.keys() <= {goal.what for goal in goals}


def test_a_goal_whose_rival_is_missing_is_not_measured(tmp_path: Path) -> None:
    contest = _contest(_goal(1))
    del contest.samples["a | b"]
    contest.left_out["a | b"] = "no node"
    text = _write(tmp_path, single=contest)
    assert "| datapipe / b | >= 1 | not measured: no node |  |" in text
    assert "Left out: a | b (no node)." in text


def test_of_two_contests_with_one_goal_the_worse_is_told(tmp_path: Path) -> None:
    better, worse = _contest(_goal(1)), _contest(_goal(1), ours=150)
    worse.name = "256 connections"
    results = {"single": Result("", "", [better, worse])}
    page.write(tmp_path / "benchmarks.md", [_SINGLE], results)
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.count("| datapipe / b |") == 1
    assert "| 1.50 (256 connections) | met |" in text


def test_of_several_rivals_with_one_goal_the_worse_is_named(tmp_path: Path) -> None:
    samples: dict[str, list[Sample]] = {
        "1 lane": [{"peak_mb": 100}, {"peak_mb": 110}],
        "9 lanes": [{"peak_mb": 120}, {"peak_mb": 201}],
    }
    contest = Contest("by lanes", samples, memory_goals("growth", *samples))
    text = _write(tmp_path, single=contest)
    assert "| growth, peak MB | <= 200 | 160 <sub>120 to 201</sub> (9 lanes) | **MISSED** |" in text


def test_a_picture_is_well_formed_and_shows_spreads() -> None:
    bars = [Bar("a < b & c", Spread(50, 40, 100), True), Bar("peer", Spread(25, 25, 25), False)]
    root = ElementTree.fromstring(svg("T & U", [Group("events/s", ",.0f", bars)]))
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{name}text")]
    assert texts == ["events/s", "a < b & c", "50", "peer", "25"]
    ours, theirs = [rect for rect in root.iter(f"{name}rect") if rect.get("class") != "page"]
    assert float(ours.get("width", 0)) == pytest.approx(2 * float(theirs.get("width", 0)))
    assert (ours.get("class"), theirs.get("class")) == ("ours", "bar")
    assert len(list(root.iter(f"{name}path"))) == 1, "a spread of nothing is not drawn"
    right = float(ours.get("x", 0)) + float(ours.get("width", 0))
    assert right < float(root.get("width", 0))
    style = root.find(f"{name}style")
    assert style is not None
    assert "prefers-color-scheme: dark" in (style.text or "")


def test_what_an_event_costs_stands_in_one_table() -> None:
    samples = {"journal": [{"rate": 9.0, "cpu_s_per_million": 30.0}]}
    contest = Contest("64 connections", samples)
    costs = nats.costs("single", contest)
    assert costs == {"single, journal": [{"cpu_s_per_million": 30.0}]}
    assert contest.samples == {"journal": [{"rate": 9.0}]}


def test_of_loads_the_median_counts_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    took, now = [9.0, 1.0, 4.0, 2.0], 0.0
    monkeypatch.setattr(databases.time, "perf_counter", lambda: now)
    store = SqliteStore()
    monkeypatch.setattr(store, "rows", lambda url: 4 * 180_000)
    loads = databases.Loads(store, 7)
    for seconds in took:
        assert not loads.enough()
        with loads.timed():
            now += seconds
    assert loads.enough()
    sample = loads.sample("")
    assert (sample["rate"], sample["loads"]) == (90_000, 3)
    monkeypatch.setattr(store, "rows", lambda url: 4 * 180_000 - 1)
    with pytest.raises(RuntimeError, match="720000 rows were loaded, 719999 are in the table"):
        loads.sample("")


async def test_a_watched_load_says_how_late_the_event_loop_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def load(self: object, block: bool) -> str:
        await asyncio.sleep(0)  # the watcher falls asleep
        if block:
            time.sleep(0.05)
        return "loaded"

    monkeypatch.setattr(TransactionalSink, "load", load)  # what is patched is taken back
    monkeypatch.delitem(sys.modules, databases.WATCHER, raising=False)
    import_module(databases.WATCHER)
    monkeypatch.delitem(sys.modules, databases.WATCHER)
    call: Any = TransactionalSink.load
    with structlog.testing.capture_logs() as logged:
        for block in (True, False):
            assert await call(None, block) == "loaded"
    blocked, plain = (line["late_ms"] for line in logged if line["event"] == databases.LOGGED)
    assert [late >= 40 for late in blocked] == [True]
    assert plain == [], "it was not late when the load ended"
