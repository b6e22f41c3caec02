"""Which event types the page shows, and in which order: a bounded part, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

Lane = Mapping[str, Any]  # as in /status.json

ROWS = 50  # at most
NAMES = 100  # of idle types, at most
UNFOLDED = 10  # with no more types than these, idle ones have rows like others
_LONGEST = 60  # of what is searched for: names are shorter

SORTS = {  # what the setting of the order is called
    "": "busy first",
    "name": "by name",
    "waiting": "most waiting",
    "oldest": "oldest waiting",
    "accepted": "most accepted per s",
    "loaded": "most loaded per s",
}
_MOST: dict[str, Callable[[Lane], float]] = {
    "waiting": lambda lane: lane["waiting"],
    "oldest": lambda lane: lane["oldest_seconds"],
    "accepted": lambda lane: lane["accepted_per_second"],
    "loaded": lambda lane: lane["loaded_per_second"],
}


class View(NamedTuple):
    """What a reader has asked to see, as the page's address has it.

    Attributes: q: a part of names, or a state. sort: one of SORTS. type: the row that is open.
    """

    q: str = ""
    sort: str = ""
    type: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> View:
        """From the query of an address; what makes no sense there counts as not said."""
        sort = query.get("sort", "")
        return cls(
            query.get("q", "").strip()[:_LONGEST],
            sort if sort in SORTS else "",
            query.get("type", ""),
        )

    def link(self, **changes: str) -> str:
        """The address of this view, changed."""
        said = {key: value for key, value in self._replace(**changes)._asdict().items() if value}
        return f"?{urlencode(said)}" if said else "./"


class Overview(NamedTuple):
    """What is shown.

    Attributes:
        rows: the lanes that have a row each, in order, by name.
        idle: names of types without a row, for they are well and nothing has happened lately.
        idle_count: how many those are, and `idle` may be fewer.
        matching, total: how many types were found, and how many there are.
        blocked, blocked_rows: how many of those found are blocked, and how many of these have rows.
    """

    view: View
    rows: Mapping[str, Lane]
    idle: Sequence[str]
    idle_count: int
    matching: int
    total: int
    blocked: int
    blocked_rows: int

    @property
    def left_out(self) -> int:
        """Types that have neither a row nor are idle."""
        return self.matching - self.idle_count - len(self.rows)


def overview(lanes: Mapping[str, Lane], view: View) -> Overview:
    """What this view shows of these lanes."""
    wanted = view.q.lower().replace(" ", "_")
    found = {
        name: lane
        for name, lane in lanes.items()
        if wanted in name or wanted == lane["state"] or (wanted == "full" and lane["full"])
    }
    folds = not view.q and len(lanes) > UNFOLDED
    idle = {name for name, lane in found.items() if folds and name != view.type and _idle(lane)}
    order = sorted(found.keys() - idle, key=_order(found, view.sort))
    shown = order[:ROWS]
    if view.type in found and view.type not in shown:
        shown[-1:] = [view.type]
    rows = {name: found[name] for name in shown}
    return Overview(
        view, rows, sorted(idle)[:NAMES], len(idle), len(found), len(lanes),
        _blocked(found), _blocked(rows),
    )  # fmt: skip


def _order(lanes: Mapping[str, Lane], sort: str) -> Callable[[str], tuple[float, str]]:
    if sort == "name":
        return lambda name: (0, name)
    if sort in _MOST:
        return lambda name: (-_MOST[sort](lanes[name]), name)
    return lambda name: (_rank(lanes[name]), name)


def _rank(lane: Lane) -> int:
    if lane["state"] == "blocked" or lane["full"]:  # the others may pass by themselves
        return 0
    return 1 if unwell(lane) else 2 + lane["idle"]


def unwell(lane: Lane) -> bool:
    """Whether a person should look at it."""
    return bool(
        lane["state"] in ("blocked", "retrying")
        or lane["error"]
        or lane["full"]
        or lane["slow_load"]
        or not lane["balanced"]
    )


def _idle(lane: Lane) -> bool:
    return bool(lane["idle"]) and not unwell(lane)


def _blocked(lanes: Mapping[str, Lane]) -> int:
    return sum(lane["state"] == "blocked" for lane in lanes.values())
