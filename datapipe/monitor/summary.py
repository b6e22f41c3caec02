"""The sentence at the top: healthy, or what is wrong, since when, and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from datapipe.monitor import formats
from datapipe.pipeline.records import iso

NEARLY_FULL = 0.8  # of the mirror


class Trouble(NamedTuple):
    """One thing that is wrong: `what {since}: why. then`, the second part empty where it says
    nothing."""

    state: str
    what: str
    why: str
    then: str

    def sentence(self, since: str) -> str:
        why = f": {self.why.rstrip('.')}" if self.why else ""
        return f"{self.what} {since}{why}. {self.then}"


class Summary:
    """Puts the sentence together, and remembers since when each trouble lasts."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], float] = {}

    def of(self, status: Mapping[str, Any], refusing: str | None) -> dict[str, Any]:
        """The key `summary` of `/status.json`.

        Args:
            status: the other keys of it.
            refusing: why events are refused now, or None.
        """
        now = time.time()
        found = list(troubles(status, refusing))
        self._since = {key: self._since.get(key, now) for key in ((t.state, t.what) for t in found)}
        texts = [t.sentence(self._told(t, now)) for t in found]
        if not found:
            return {"state": "healthy", "text": healthy(status), "since": None, "also": []}
        first = found[0]
        return {
            "state": first.state,
            "text": texts[0],
            "since": iso(self._since[first.state, first.what]),
            "also": texts[1:],
        }

    def _told(self, trouble: Trouble, now: float) -> str:
        if trouble.state == "starting":
            return "yet"
        since = datetime.fromtimestamp(self._since[trouble.state, trouble.what], UTC)
        today = since.date() == datetime.fromtimestamp(now, UTC).date()
        return f"since {since:%H:%M} UTC" if today else f"since {since:%Y-%m-%d %H:%M} UTC"


def healthy(status: Mapping[str, Any]) -> str:
    waiting = status["books"]["waiting"]
    if not waiting:
        return "Healthy. Nothing waits, and the books balance."
    due = [lane["next_load_seconds"] for lane in status["lanes"].values()]
    nearest = min((seconds for seconds in due if seconds is not None), default=None)
    when = "" if nearest is None else f", the next in {formats.roughly(nearest)}"
    return f"Healthy. {formats.events(waiting)} waiting to be loaded{when}."


def troubles(status: Mapping[str, Any], refusing: str | None) -> Iterator[Trouble]:
    """What is wrong now, the worst first."""
    mirror, database = status["mirror"], status["database"]
    if refusing is not None:
        then = _refusing(status, refusing)
        yield Trouble("refusing", "Events are refused", refusing, then)
    if database["up"] is False and database["error"]:
        then = (
            f"{_kept(status)} Start the database, or mend what the error names; loading then goes "
            "on by itself."
        )
        yield Trouble("database_down", "PostgreSQL does not answer", database["error"], then)
    if not status["books"]["balanced"]:
        then = "This is a fault of datapipe: please report it with the log and /status.json."
        yield Trouble("unbalanced", "The books do not balance", "", then)
    yield from sorted(_lanes(status), key=lambda trouble: trouble.state)
    if refusing is None and mirror["bytes"] >= NEARLY_FULL * mirror["max_bytes"]:
        share = f"{mirror['bytes'] / mirror['max_bytes']:.0%} used"
        then = (
            f"{_kept(status)} When it is full, events are refused: see to it that lanes are "
            "loaded, or give it more room in the settings."
        )
        yield Trouble("nearly_full", "The mirror is nearly full", share, then)
    if database["up"] is False and not database["error"]:
        then = "Events are kept meanwhile."
        yield Trouble("starting", "The database has not been reached", "", then)
    if mirror["left_messages"]:
        messages = f"{formats.count(mirror['left_messages'])} messages, not counted below"
        within = formats.roughly(mirror["left_seconds"])
        then = f"They will be taken over within about {within}; nothing need be done."
        what = "A process that is gone has left events in the mirror"
        yield Trouble("recovering", what, messages, then)


def _refusing(status: Mapping[str, Any], refusing: str) -> str:
    mirror = status["mirror"]
    waiting = f"{formats.events(status['books']['waiting'])} waiting."
    if not mirror["up"]:
        return f"Clients are told to try again. {waiting} Mend what the error names."
    if "shutting down" not in refusing:
        return f"{waiting} Room comes as lanes are loaded: see the lanes below."
    return f"Clients are told to try again. {waiting}"


def _lanes(status: Mapping[str, Any]) -> Iterator[Trouble]:
    for name, lane in status["lanes"].items():
        waiting = f"{formats.events(lane['waiting'])} waiting."
        if lane["full"]:
            waiting += " It has used up its share of the mirror: new ones are refused."
        if lane["blocked"] is not None:
            then = f"Its events are kept, {waiting} Mend the cause, then press Load now."
            yield Trouble("lane_blocked", f"Lane {name} is blocked", lane["blocked"], then)
        elif lane["error"] is not None:
            then = f"It is tried again by itself. Its events are kept, {waiting}"
            yield Trouble("lane_failing", f"Lane {name} can't be loaded", lane["error"], then)
        if lane["slow_load"] is not None:
            why, then = _slow(lane["slow_load"]["waits_for"])
            what = f"A load of lane {name} has been under way"
            yield Trouble("lane_slow", what, why, f"{then}Its events are kept, {waiting}")


def _slow(waits_for: str | None) -> tuple[str, str]:
    """Why a load is slow, and what to do, by what PostgreSQL says that it waits for."""
    if waits_for is None:
        return "", ""
    if waits_for.endswith("SyncRep"):
        why = f"COMMIT waits for the synchronous standby ({waits_for})"
        return why, "Bring the standby back, or change synchronous_standby_names. "
    return f"PostgreSQL waits ({waits_for})", ""


def _kept(status: Mapping[str, Any]) -> str:
    """Events are kept, how many, and for how long there is room."""
    mirror = status["mirror"]
    text = f"Events are kept, {formats.count(status['books']['waiting'])} waiting"
    left = mirror["seconds_left"]
    if left is None:
        room = max(0, mirror["max_bytes"] - mirror["bytes"])
        return f"{text}, room for {formats.size(room)} more."
    return f"{text}, room for about {formats.roughly(left)} at this rate."
