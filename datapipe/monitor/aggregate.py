"""Several processes as one: counts are added; what is worst, oldest or latest stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from datapipe.monitor.history import POINTS, SERIES, STEP_S
from datapipe.pipeline.records import LOADS

Snapshot = Mapping[str, Any]

BOOKS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting")
_TOTALS = ("waiting_bytes", "in_memory", "parked", "accepted_per_second", "loaded_per_second")
_STATES = ("blocked", "retrying", "loading", "waiting", "empty")  # the worst first


def together(own: Snapshot, others: Iterable[Snapshot]) -> dict[str, Any]:
    """One snapshot of all processes, and the books and totals over all lanes.

    What only our own process can tell (version, schema, ...) is ours.
    """
    everybody = [own, *map(_completed, others)]
    lanes: dict[str, dict[str, Any]] = {}
    for each in everybody:
        for name, lane in each["lanes"].items():
            lanes[name] = _lane(lanes[name], lane) if name in lanes else dict(lane)
    loads = [load for each in everybody for load in each["recent_loads"]]
    return {
        **own,
        "processes": len(everybody),
        "uptime_seconds": max(each["uptime_seconds"] for each in everybody),
        "books": _books(lanes.values()),
        "totals": _totals(lanes.values()),
        "lanes": dict(sorted(lanes.items())),
        "rejected": dict(sum((Counter(each["rejected"]) for each in everybody), Counter())),
        "mirror": _mirror([each["mirror"] for each in everybody]),
        "database": _worst([each["database"] for each in everybody]),
        "recent_loads": sorted(loads, key=lambda load: load["at"], reverse=True)[:LOADS],
    }


def _completed(status: Snapshot) -> Snapshot:
    """With what a process of release 1.0 does not tell: both may run while one is replaced."""
    lanes = {name: {"slow_load": None, **lane} for name, lane in status["lanes"].items()}
    mirror = {"left_messages": 0, "left_seconds": None, **status["mirror"]}
    return {**status, "lanes": lanes, "mirror": mirror}


def together_series(series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The series of the pictures, added up; `series` holds those of each process, by lane."""
    names = sorted({name for each in series for name in each})
    lanes = {name: add_series([each[name] for each in series if name in each]) for name in names}
    total = add_series(list(lanes.values())) if lanes else {key: [] for key in SERIES}
    return {"step_seconds": STEP_S, "points": POINTS, "lanes": lanes, "total": total}


def _lane(one: Snapshot, two: Snapshot) -> dict[str, Any]:
    added = {
        key: round(value + two[key], 1) if isinstance(value, float) else value + two[key]
        for key, value in one.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        and isinstance(two[key], int | float)
    }  # fmt: skip
    return {
        **one,
        **added,
        "balanced": one["balanced"] and two["balanced"],
        "full": one["full"] or two["full"],
        "oldest_seconds": max(one["oldest_seconds"], two["oldest_seconds"]),
        "state": min(one["state"], two["state"], key=_STATES.index),
        "blocked": one["blocked"] or two["blocked"],
        "error": one["error"] or two["error"],
        "last_load": _pick(max, (one, two), "last_load", lambda load: load["at"]),
        "slow_load": _pick(max, (one, two), "slow_load", lambda load: load["seconds"]),
        "next_load_seconds": _pick(min, (one, two), "next_load_seconds", lambda seconds: seconds),
    }


def _pick(
    choose: Callable[..., Any], lanes: Iterable[Snapshot], name: str, key: Callable[[Any], Any]
) -> Any:
    return choose((e[name] for e in lanes if e[name] is not None), key=key, default=None)


def _books(lanes: Collection[Snapshot]) -> dict[str, Any]:
    books: dict[str, Any] = {key: sum(lane[key] for lane in lanes) for key in BOOKS}
    return books | {"balanced": all(lane["balanced"] for lane in lanes)}


def _totals(lanes: Collection[Snapshot]) -> dict[str, Any]:
    """What the books do not tell."""
    totals = {key: round(sum(lane[key] for lane in lanes), 1) for key in _TOTALS}
    oldest = max((lane["oldest_seconds"] for lane in lanes), default=0.0)
    return totals | {"oldest_seconds": oldest}


def _mirror(mirrors: Sequence[Snapshot]) -> dict[str, Any]:
    calls: Counter[str] = sum((Counter(each["calls"]) for each in mirrors), Counter())
    return {
        **_worst(mirrors),
        "requests": sum(each["requests"] for each in mirrors),
        "requests_this_month": sum(each["requests_this_month"] for each in mirrors),
        "calls": dict(calls),
    }


def _worst(states: Sequence[Snapshot]) -> dict[str, Any]:
    """The first that is down, else our own."""
    return dict(next((state for state in states if not state["up"]), states[0]))


def add_series(series: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Point by point, aligned at the newest."""
    added = {}
    for key in series[0]:
        columns = [each[key] for each in series]
        length = max(map(len, columns), default=0)
        padded = [[0.0] * (length - len(column)) + column for column in columns]
        added[key] = [round(sum(point), 1) for point in zip(*padded, strict=True)]
    return added
