"""The sentence at the top: healthy, or what is wrong, since when, why, and what to do.

It is made of the health of the parts alone. A part that fails, or whose work takes too long, is a
trouble, whatever part it is; the table says in which words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from datapipe.mirrors import name_of
from datapipe.monitor import formats


class Words(NamedTuple):
    """`what` (since when): why. `then`; both may name facts, such as {lane}.

    Attributes: more: of those beyond the first few of a state, how many they are.
    """

    state: str
    what: str
    then: str
    when: str = " (since {moment})"
    more: str = ""


# By part and what is wrong with it; the worst first.
WORDS = {
    ("ingest", "fails"): Words("refusing", "Events are refused", "{refusing}"),
    ("database", "fails"): Words(
        "database_down", "{product} does not answer",
        "{kept} Start it, or repair the way to it; loading then goes on by itself.",
    ),
    ("database", "refuses"): Words(
        "database_down", "{product} refuses us",
        "{kept} Repair what the error names; loading then goes on by itself.",
    ),
    ("books", "fails"): Words(
        "unbalanced", "Not every event is accounted for",
        "This is a defect of datapipe: please report it with the log and /status.json.",
    ),
    ("load", "is blocked"): Words(
        "lane_blocked", "Event type {lane} is blocked",
        "Its events are kept, {waiting} {again}",
        more="{more} more event types are blocked",
    ),
    ("load", "fails"): Words(
        "lane_failing", "Event type {lane} can't be loaded",
        "It is tried again by itself. Its events are kept, {waiting}",
        more="{more} more event types can't be loaded",
    ),
    ("load", "is slow"): Words(
        "lane_slow", "A load of {lane} has been under way",
        "{remedy}Its events are kept, {waiting}", " since {moment}",
    ),
    ("shares", "fails"): Words(
        "lane_full", "Some events are refused",
        "They are taken again once some of their type are loaded; those of other types are taken.",
    ),
    ("room", "fails"): Words(
        "nearly_full", "{Mirror} is nearly full",
        "{room} When it is full, events are refused: see to it that what waits is loaded, or make "
        "more room{setting}.",
    ),
    ("dead_letters", "fails"): Words(
        "dead_letters", "{dead}",
        "{product} refused {them}, and {they} kept. See why under Dead letters, or by datapipe "
        "dead list; repair that and put {them} back, or drop {them} for good.",
        ", since {moment}",
    ),
    ("database", "is new"): Words(
        "starting", "{product} has not been reached", "Events are kept meanwhile.", " yet"
    ),
    ("leftovers", "fails"): Words(
        "recovering", "A process that died has left events in {mirror}",
        "They will be taken over within about {left}; nothing need be done.",
    ),
    ("ended", "fails"): Words("process_ended", "{ended} ended", "{takeover}", " at {moment}"),
    ("peers", "fails"): Words(
        "process_silent", "No answer from {silent}",
        "The numbers here lack theirs. If one has died, others load what it had taken, half a "
        "minute later.",
    ),
}  # fmt: skip
_RANK = {key: rank for rank, key in enumerate(WORDS)}
# What other parts do is called, and what it means that it is not done; said before a full mirror.
WORK = {
    "append": ("An append to {mirror}", "Its events are not accepted yet."),
    "recovery": (
        "The recovery of what dead processes left",
        "It stays in {mirror}, and is not counted below.",
    ),
    "heartbeat": (
        "The heartbeat",
        "Other processes may take this one for dead and load its events too; none is doubled.",
    ),
    "removal": ("The removal of loaded events", "They take up room in {mirror} meanwhile."),
    "upkeep": (
        "The upkeep of {mirror}",
        "Meanwhile it gives no space back, and messages of a remote one come closer to their end.",
    ),
    "count": ("The count of dead letters", "How many there are now is not known meanwhile."),
    "tables": (
        "The upkeep of tables",
        "Meanwhile no partitions are made ahead, and what is older than its retention stays.",
    ),
}
_WORK_RANK = _RANK["room", "fails"] - 0.5
# until others begin to load what was accepted by a process that ended
_TAKEOVER_S = {"journal": 35.0, "ironmq": 45.0}
_LONGEST_TAKEOVER_S = 60.0
_ROOM = {
    "journal": "journal_max_bytes", "ironmq": "ironmq_max_bytes", "nats": "nats_lane_max_bytes",
    "none": "buffer_max_bytes",
}  # fmt: skip
_HARDLY_S = 10
_LONG_S = 30 * 86_400  # beyond, the rate of a minute says nothing
_AGAIN = "They are tried again by themselves, or at once by Load now on the page."
_LANES_NAMED = 3
_NONE: Mapping[str, Any] = {"lanes": {}}
# A part is not named while one of these fails: then that is why, or says the same. Nor is one that
# failed before they worked again and has not been tried since.
_BECAUSE = {
    "mirror": ("ingest",), "append": ("ingest",), "room": ("ingest",), "load": ("database",),
    "shares": ("ingest",),
    "heartbeat": ("database",), "recovery": ("mirror", "database"), "peers": ("mirror",),
    "upkeep": ("mirror", "database"), "removal": ("mirror",), "count": ("database",),
    "tables": ("database",),
}  # fmt: skip


class _Trouble(NamedTuple):
    rank: float
    state: str
    since: str
    sentence: str
    more: str


def summary(status: Mapping[str, Any]) -> dict[str, Any]:
    """The key `summary` of `/status.json`, by the other keys."""
    found = sorted(_troubles(status), key=lambda trouble: trouble.rank)
    if not found:
        return {"state": "healthy", "text": _healthy(status), "since": None, "also": []}
    texts = list(_texts(found))
    return {"state": found[0].state, "text": texts[0], "since": found[0].since, "also": texts[1:]}


def _texts(found: Iterable[_Trouble]) -> Iterator[str]:
    """A sentence for each; of event types in the same state for the first few."""
    for _, group in groupby(found, key=lambda trouble: (trouble.rank, trouble.state)):
        troubles = list(group)
        named = _LANES_NAMED if troubles[0].more else len(troubles)
        yield from (trouble.sentence for trouble in troubles[:named])
        if (more := len(troubles) - named) > 0:
            yield f"{troubles[0].more.format(more=formats.count(more))}: see the table below."


def _healthy(status: Mapping[str, Any]) -> str:
    waiting = status["books"]["waiting"]
    if not waiting:
        return "Healthy. Nothing waits, and every event is accounted for."
    due = [lane["next_load_seconds"] for lane in status["lanes"].values()]
    nearest = min((seconds for seconds in due if seconds is not None), default=None)
    when = "" if nearest is None else f", the next load in {formats.roughly(nearest)}"
    return f"Healthy. {formats.events(waiting)} waiting to be loaded{when}."


def _troubles(status: Mapping[str, Any]) -> Iterator[_Trouble]:
    """What is wrong now."""
    by_name = {part["part"]: part for part in status["parts"]}
    for part in status["parts"]:
        causes = [by_name[c] for c in _BECAUSE.get(part["part"], ()) if c in by_name]
        named = all(cause["up"] is not False for cause in causes)
        tried = all(part["at"] >= cause["since"] for cause in causes)
        lane = status["lanes"].get(part["lane"], {})
        if lane.get("blocked") is not None:
            yield _trouble(status, part, "is blocked")
        elif part["part"] == "dead_letters" and not dead_letters(status):
            pass  # another process has counted since
        elif part["up"] is False and named and tried:
            refuses = part["part"] == "database" and status["database"].get("refuses")
            yield _trouble(status, part, "refuses" if refuses else "fails")
        elif part["up"] is None and part["part"] == "database":
            yield _trouble(status, part, "is new")
        if part["slow"] and named:
            yield _trouble(status, part, "is slow")


def dead_letters(status: Mapping[str, Any]) -> dict[str, int]:
    """How many there are now, by lane; the lanes that have some."""
    return {name: n for name, n in (status.get("dead_letters") or _NONE)["lanes"].items() if n}


def _trouble(status: Mapping[str, Any], part: Mapping[str, Any], wrong: str) -> _Trouble:
    key, slow, facts = (part["part"], wrong), wrong == "is slow", _facts(status, part)
    words = WORDS.get(key) or work_words(part["part"], slow)
    since = part["doing_since"] if slow else part["since"]
    when = words.when.format(moment=_moment(since, status["now"]))
    why = _wait(status, part) if slow else part["error"]
    if wrong == "is blocked":  # that may have failed once more, for another reason
        why = status["lanes"][part["lane"]]["blocked"]
    because = f": {why.rstrip('.')}" if why else ""
    what, then = words.what.format(**facts), words.then.format(**facts)
    sentence = " ".join(f"{what}{when}{because}. {then}".split())
    return _Trouble(_RANK.get(key, _WORK_RANK), words.state, since, sentence, words.more)


def work_words(part: str, slow: bool) -> Words:
    """Those of a part that has none of its own; also of one that only a newer peer has."""
    what, then = WORK.get(part, (f"The work of {part}", ""))
    if slow:
        return Words(f"{part}_slow", f"{what} has been under way", then, " since {moment}")
    return Words(f"{part}_failing", f"{what} fails", f"It is tried again by itself. {then}")


def _facts(status: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, str]:
    """What the words may name."""
    lane = status["lanes"].get(part["lane"], {"waiting": 0})
    mirror = name_of(status["mirror"]["kind"])
    setting = _ROOM.get(status["mirror"]["kind"])
    one_dead = sum(dead_letters(status).values()) == 1
    return {
        "lane": part["lane"],
        "again": "" if lane.get("next_load_seconds") is None else _AGAIN,
        "mirror": mirror,
        "Mirror": _capital(mirror),
        "setting": f" ({setting})" if setting else "",
        "silent": ", ".join(status["silent"]),
        "ended": formats.processes(len(status["ended"])),
        "takeover": _takeover(status["mirror"], len(status["ended"])),
        "dead": _dead(status),
        "them": "it" if one_dead else "them",
        "they": "it is" if one_dead else "they are",
        "waiting": f"{formats.count(lane['waiting'])} waiting.",
        "kept": _kept(status),
        "room": _room(status),
        "refusing": _refusing(status, part["error"]),
        "left": formats.roughly(status["mirror"].get("left_seconds") or 0),
        "product": _product(status),
        "remedy": f"{remedy} " if (remedy := part.get("remedy")) else "",
    }


def _dead(status: Mapping[str, Any]) -> str:
    """1,204 events are dead letters (install 1,200, purchase 4)"""
    lanes = sorted(dead_letters(status).items(), key=lambda lane: -lane[1])
    total = sum(count for _, count in lanes)
    named = [f"{name} {formats.count(count)}" for name, count in lanes[:_LANES_NAMED]]
    if more := len(lanes) - len(named):
        named.append(f"and {formats.count(more)} more types")
    are = "is a dead letter" if total == 1 else "are dead letters"
    return f"{formats.events(total)} {are} ({', '.join(named)})"


def _takeover(mirror: Mapping[str, Any], ended: int) -> str:
    """What becomes of the events of processes that ended; "How soon" in docs/operations.md."""
    if mirror["kind"] == "none":
        return "What was held in memory there is lost."
    within = formats.roughly(_TAKEOVER_S.get(mirror["kind"], _LONGEST_TAKEOVER_S))
    whose = "Its" if ended == 1 else "Their"
    return f"{whose} events are taken over within {within}; nothing need be done."


def _product(status: Mapping[str, Any]) -> str:
    """What the database is called, to begin a sentence with."""
    return _capital(status["database"]["product"])


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _wait(status: Mapping[str, Any], part: Mapping[str, Any]) -> str | None:
    """What work that is slow waits for, if the database says so; older peers know no meaning."""
    if not (event := part["waits_for"]):
        return None
    return f"{part.get('meaning') or f'{_product(status)} waits'} ({event})"


def _refusing(status: Mapping[str, Any], why: str | None) -> str:
    count = status["books"]["waiting"]
    waiting = f"{formats.events(count)} waiting." if count else ""
    if not status["mirror"]["up"]:
        return f"Clients are asked to try again. {waiting} Repair what the error names."
    if "of disk" in (why or ""):
        return f"Free some; no restart is needed. {waiting}"
    if "shutting down" not in (why or ""):
        return f"{waiting} There is room again once some are loaded: see the event types below."
    return f"Clients are asked to try again. {waiting}"


def _moment(at: str, now: str) -> str:
    """12:03 UTC; with its date unless that is today's."""
    day = "" if at[:10] == now[:10] else f"{at[:10]} "
    return f"{day}{at[11:16]} UTC"


def _room(status: Mapping[str, Any]) -> str:
    """How much there is, where nothing else says so."""
    said = status["database"].get("up") is False or status["mirror"].get("fullest") is not None
    return "" if said else _kept(status)


def _kept(status: Mapping[str, Any]) -> str:
    """Events are kept, how many, and for how long there is room."""
    mirror, waiting = status["mirror"], formats.count(status["books"]["waiting"])
    if not status.get("ready", True):
        return f"What was accepted is kept, {waiting} waiting."
    text = f"Events are kept, {waiting} waiting"
    if (fullest := mirror.get("fullest")) is not None:  # the sum says too little
        return f"{text}; {fullest:.0%} of the fullest event type's stream is used."
    left = mirror["seconds_left"]
    if left is None or left > _LONG_S:
        room = max(0, mirror["max_bytes"] - mirror["bytes"])
        return f"{text}, room for {formats.size(room)} more."
    if left < _HARDLY_S:
        return f"{text}, hardly any room for more."
    return f"{text}, room for about {formats.roughly(left)} at this rate."
