"""Several processes as one: counts are added; what is worst, oldest or latest stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datapipe.monitor.history import POINTS, SERIES, STEP_S
from datapipe.pipeline.records import LOADS

Snapshot = Mapping[str, Any]
Rule = Callable[[Sequence[Any]], Any]  # one value of those that the processes have

BOOKS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting")
IN_HAND = ("taken", "returned", "in_hand")  # of what processes take from a mirror that they share
OUTCOMES = ("accepted", "rejected", "limited")  # of what was posted with a named ingest key
# The equation that holds for a lane, as people read it, and what stands beside it where any process
# loads what any has accepted.
_COLUMNS = (
    ("accepted", "accepted"), ("+ recovered", "recovered"), ("= loaded", "loaded"),
    ("+ duplicate", "duplicate"), ("+ dead", "dead"), ("+ waiting", "waiting"),
    ("balanced", "balanced"),
)  # fmt: skip
_SHARED_COLUMNS = (
    ("taken", "taken"), ("= loaded", "loaded"), ("+ duplicate", "duplicate"), ("+ dead", "dead"),
    ("+ returned", "returned"), ("+ in hand", "in_hand"), ("balanced", "balanced"),
    ("accepted", "accepted"), ("waiting", "waiting"),
)  # fmt: skip
_STATES = ("blocked", "retrying", "loading", "waiting", "empty")  # the worst first


def columns(shared: bool) -> Sequence[tuple[str, str]]:
    """The columns of the books: their headings and keys. Args: shared: so is the mirror."""
    return _SHARED_COLUMNS if shared else _COLUMNS


def _total(values: Sequence[float]) -> float:
    return round(sum(values), 1)


def _sum(values: Sequence[int | None]) -> int:
    return sum(value or 0 for value in values)


def _counts(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, values), Counter()))


def _first(values: Sequence[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _latest(values: Sequence[str | None]) -> str | None:
    return max((value for value in values if value is not None), default=None)


def _least(values: Sequence[Any]) -> Any:
    return min((value for value in values if value is not None), default=None)


def _most(key: str) -> Rule:
    """Of some objects the one in which this key is the largest."""

    def rule(values: Sequence[Any]) -> Any:
        return max((v for v in values if v is not None), key=lambda v: v[key], default=None)

    return rule


def _keys(values: Sequence[Mapping[str, Snapshot] | None]) -> dict[str, Any]:
    """The use of named ingest keys, by name."""
    everybody = [keys for keys in values if keys is not None]
    names = sorted({name for keys in everybody for name in keys})
    return {
        name: _merged(_KEY, [keys[name] for keys in everybody if name in keys]) for name in names
    }


def _worst(values: Sequence[str]) -> str:
    return min(values, key=_STATES.index)


_BOOKS: dict[str, Rule] = {**dict.fromkeys((*BOOKS, *IN_HAND), _sum), "balanced": all}
_TOTALS: dict[str, Rule] = {
    "waiting_bytes": sum, "in_memory": sum, "parked": sum, "accepted_per_second": _total,
    "loaded_per_second": _total, "oldest_seconds": lambda values: max(values, default=0.0),
}  # fmt: skip
_LANE: dict[str, Rule] = {
    **_BOOKS, **_TOTALS, "replayed": sum, "full": any, "state": _worst, "blocked": _first,
    "error": _first, "last_load": _most("at"), "slow_load": _most("seconds"),
    "next_load_seconds": _least, "idle": all,
}  # fmt: skip
# of a mirror that they share each process counts all that waits there, not a part of it
_SHARED_LANE = _LANE | dict.fromkeys(("waiting", "waiting_bytes", "oldest_seconds", "full"), _first)
# what stands in none of these is that of the process itself, or of the one that is worst off
_MIRROR: dict[str, Rule] = {"requests": sum, "requests_this_month": sum, "calls": _counts}
_KEY: dict[str, Rule] = {**dict.fromkeys(OUTCOMES, _sum), "last_seen": _latest}
_STATUS: dict[str, Rule] = {
    "processes": len, "uptime_seconds": max, "rejected": _counts, "keys": _keys,
    "dead_letters": _most("at"),
}  # fmt: skip


def _merged(rules: Mapping[str, Rule], snapshots: Iterable[Snapshot]) -> dict[str, Any]:
    """Each key by its rule; one that a process of another version lacks counts as None there."""
    found = list(snapshots)
    return {key: rule([each.get(key) for each in found]) for key, rule in rules.items()}


def together(own: Snapshot, others: Iterable[Snapshot]) -> dict[str, Any]:
    """One snapshot of all processes, and the books and totals over all lanes."""
    everybody = [own, *others]
    shared = own["mirror"]["shared"]
    rules = _SHARED_LANE if shared else _LANE
    names = sorted({name for each in everybody for name in each["lanes"]})
    lanes = {
        name: _merged(rules, [each["lanes"][name] for each in everybody if name in each["lanes"]])
        if len(everybody) > 1 else dict(own["lanes"][name])  # thousands take their time
        for name in names
    }  # fmt: skip
    if shared:
        for lane in lanes.values():
            lane["parked"] = max(0, lane["waiting"] - lane["in_memory"])
    mirrors, databases = ([each[key] for each in everybody] for key in ("mirror", "database"))
    loads = [load for each in everybody for load in each["recent_loads"]]
    return {
        **own,
        **_merged(_STATUS, everybody),
        "books": _merged(_BOOKS, lanes.values()),
        "totals": _merged(_TOTALS, lanes.values()),
        "lanes": lanes,
        "mirror": own["mirror"] | _down(mirrors) | _merged(_MIRROR, mirrors),
        "database": own["database"] | _down(databases),
        "parts": _parts([part for each in everybody for part in each.get("parts") or _old(each)]),
        "recent_loads": sorted(loads, key=lambda load: load["at"], reverse=True)[:LOADS],
    }


def _down(states: Sequence[Snapshot]) -> dict[str, Any]:
    """The first that is down, else our own."""
    return dict(next((state for state in states if not state["up"]), states[0]))


def _parts(parts: Iterable[Snapshot]) -> list[Snapshot]:
    """Of each part the process that is worst off: it fails, is slow, works, or did nothing yet."""
    worst: dict[tuple[str, str | None], Snapshot] = {}
    for part in parts:
        known = worst.setdefault((part["part"], part["lane"]), part)
        if _health(part) < _health(known):
            worst[part["part"], part["lane"]] = part
    return list(worst.values())


def _health(part: Snapshot) -> tuple[bool, bool, bool]:
    return part["up"] is not False, not part["slow"], part["up"] is None


def _old(status: Snapshot) -> list[dict[str, Any]]:
    """What a process of release 1.0 says of its parts; both may run while one is replaced."""
    now = status["now"]
    same = {"since": now, "at": now, "doing": None, "doing_since": None, "slow": False,
            "waits_for": None}  # fmt: skip
    errors = {name: lane["blocked"] or lane["error"] for name, lane in status["lanes"].items()}
    return [
        {"part": "load", "lane": name, "up": error is None, "error": error, **same}
        for name, error in errors.items()
    ]


def together_series(series: Sequence[Mapping[str, Any]], *, shared: bool) -> dict[str, Any]:
    """The series of the charts, added up; `series` holds those of each process, by lane.

    What waits in a mirror that they share is not: each knows all of it, from its start on.
    """
    names = sorted({name for each in series for name in each})
    lanes = {
        name: add_series([each[name] for each in series if name in each], shared=shared)
        for name in names
    }
    total = add_series(list(lanes.values())) if lanes else {key: [] for key in SERIES}
    return {"step_seconds": STEP_S, "points": POINTS, "lanes": lanes, "total": total}


def add_series(
    series: Sequence[Mapping[str, list[float]]], *, shared: bool = False
) -> dict[str, list[float]]:
    """Point by point, aligned at the newest."""
    if len(series) == 1:
        return dict(series[0])
    added = {}
    for key in series[0]:
        columns = [each[key] for each in series]
        length = max(map(len, columns), default=0)
        padded = [[0.0] * (length - len(column)) + column for column in columns]
        whole = max if shared and key == "waiting" else sum
        added[key] = [round(whole(point), 1) for point in zip(*padded, strict=True)]
    return added
