from __future__ import annotations

import re
from typing import Any

import pytest

from datapipe.monitor import formats
from datapipe.monitor.summary import WORK, summary

GIB = 1024**3
NOW, SINCE, LONG_SINCE = "2026-11-22T12:00:00Z", "2026-11-22T10:05:00.000Z", "2026-11-20T23:59:00Z"
LANE = {"waiting": 7, "full": False, "blocked": None, "next_load_seconds": 1.9}
LANES = {"install": LANE}


def part(name: str, lane: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "part": name, "lane": lane, "up": True, "since": SINCE, "at": NOW, "error": None,
        "doing": None, "doing_since": None, "slow": False, "waits_for": None, "meaning": None,
        "remedy": None, **changes,
    }  # fmt: skip


def fails(name: str, error: str = "", lane: str | None = None) -> dict[str, Any]:
    return part(name, lane, up=False, error=error)


def hangs(name: str, lane: str | None = None, *wait: str) -> dict[str, Any]:
    known = zip(("waits_for", "meaning", "remedy"), wait, strict=False)
    return part(name, lane, slow=True, doing_since=SINCE, **dict(known))


def status(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "now": NOW,
        "books": {"waiting": 1204, "balanced": True},
        "lanes": {"install": dict(LANE)},
        "silent": ["web2:4711", "web3:12"],
        "ended": [],
        "dead_letters": None,
        "database": {"product": "PostgreSQL"},
        "mirror": {
            "kind": "journal",
            "up": True,
            "bytes": 0,
            "max_bytes": GIB,
            "seconds_left": None,
            "left_messages": 0,
            "left_seconds": None,
        },
        "parts": parts or [part("ingest"), part("load", "install")],
    }
    for path, value in changes.items():
        key, _, inner = path.partition("__")
        if inner:
            shown[key][inner] = value
        else:
            shown[key] = value
    return shown


def test_healthy() -> None:
    text = "Healthy. 1,204 events waiting to be loaded, the next load in 2 s."
    assert summary(status()) == {"state": "healthy", "text": text, "since": None, "also": []}
    nothing = "Healthy. Nothing waits, and every event is accounted for."
    assert summary(status(books__waiting=0))["text"] == nothing


def test_database_down_says_since_when_why_and_for_how_long_there_is_room() -> None:
    shown = summary(status(fails("database", "connection refused."), mirror__seconds_left=10_900))
    assert (shown["state"], shown["since"], shown["also"]) == ("database_down", SINCE, [])
    assert shown["text"].startswith(
        "PostgreSQL does not answer (since 10:05 UTC): connection refused. Events are kept, "
        "1,204 waiting, room for about 3 h at this rate. Start it, or"
    )


def test_a_full_disk_is_not_emptied_by_loads() -> None:
    full = fails("ingest", "less than 64 MiB of disk is free for the journal")
    text = summary(status(full, ready=False, books__waiting=0))["text"]
    assert text.endswith("is free for the journal. Free some; no restart is needed.")


def test_room_for_years_is_told_as_a_size() -> None:
    for seconds_left in (None, 90 * 86_400):
        shown = summary(status(fails("database", "x"), mirror__seconds_left=seconds_left))
        assert "1,204 waiting, room for 1.0 GiB more." in shown["text"]


def test_where_each_type_has_a_limit_of_its_own_the_fullest_says_how_much_room_there_is() -> None:
    nats = {"mirror__kind": "nats", "mirror__fullest": 0.94, "mirror__seconds_left": 32_400}
    used = "Events are kept, 1,204 waiting; 94% of the fullest event type's stream is used. Start"
    assert used in summary(status(fails("database", "x"), **nats))["text"]
    assert "9 h" not in summary(status(fails("room", "94% used"), **nats))["text"]


def test_a_database_that_answers_and_says_no_refuses_us() -> None:
    shown = summary(status(fails("database", "no such role"), database__refuses=True))
    assert (shown["state"], shown["also"]) == ("database_down", [])
    assert shown["text"].startswith("PostgreSQL refuses us (since 10:05 UTC): no such role. ")
    assert "Start" not in shown["text"]


def test_while_nothing_is_accepted_no_room_is_told() -> None:
    full = fails("ingest", "the journal is full (journal_max_bytes)"), fails("database", "x")
    shown = summary(status(*full, ready=False))
    assert shown["text"].startswith(
        "Events are refused (since 10:05 UTC): the journal is full (journal_max_bytes). 1,204"
    )
    assert "What was accepted is kept, 1,204 waiting. Start it" in shown["also"][0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("journal", "The journal is nearly full (since 10:05 UTC): 85% used. Events"),
        ("ironmq", "or make more room (ironmq_max_bytes)."),
        ("nats", "NATS is nearly full (since"),
        ("none", "Memory is nearly full (since"),
        ("of_a_plugin", "is loaded, or make more room."),
    ],
)
def test_the_mirror_is_called_by_its_name(kind: str, words: str) -> None:
    assert words in summary(status(fails("room", "85% used"), mirror__kind=kind))["text"]


def test_of_many_blocked_types_a_few_are_named() -> None:
    names = [f"type_{n:02}" for n in range(40)]
    lanes = {name: LANE | {"blocked": f"table {name}: no"} for name in names}
    wrong = [fails("load", f"table {name}: no", name) for name in names]
    shown = summary(status(*wrong, fails("load", "a lock", "install"), lanes=lanes | LANES))
    texts = [shown["text"], *shown["also"]]
    assert [text.split(" (since")[0] for text in texts[:3]] == [
        f"Event type {name} is blocked" for name in names[:3]
    ]
    assert texts[3] == "37 more event types are blocked: see the table below."
    assert texts[4].startswith("Event type install can't be loaded (since 10:05 UTC): a lock. ")
    assert len(texts) == 5


def test_a_blocked_type_says_what_to_do_once() -> None:
    why = 'table install: app has no right to INSERT: GRANT INSERT ON "install" TO "app"'
    wrong = fails("load", why, "install")
    shown = summary(status(wrong, lanes__install=LANE | {"blocked": why}))
    assert shown["text"] == (
        f"Event type install is blocked (since 10:05 UTC): {why}. Its events are kept, 7 waiting. "
        "They are tried again by themselves, or at once by Load now on the page."
    )
    known = LANE | {"blocked": why, "next_load_seconds": None}  # by no process of this release
    shown = summary(status(wrong, lanes__install=known))
    assert shown["text"].endswith(f"{why}. Its events are kept, 7 waiting.")


def test_since_another_day() -> None:
    down = fails("database", "x") | {"since": LONG_SINCE}
    assert "(since 2026-11-20 23:59 UTC): x." in summary(status(down))["text"]


@pytest.mark.parametrize(
    ("wrong", "changes", "state"),
    [
        (fails("ingest", "the mirror is full"), {}, "refusing"),
        (fails("books"), {}, "unbalanced"),
        (fails("room", "85% used"), {}, "nearly_full"),
        (fails("shares", "no room for install"), {}, "lane_full"),
        (part("database", up=None), {}, "starting"),
        (fails("leftovers", "20 messages"), {"mirror__left_seconds": 60}, "recovering"),
        (fails("load", "no column x", "install"),
         {"lanes__install": LANE | {"blocked": "no column x"}}, "lane_blocked"),
        (fails("load", "a lock", "install"), {}, "lane_failing"),
        (fails("peers"), {}, "process_silent"),
        (fails("ended", "web2:4711"), {"ended": ["web2:4711"]}, "process_ended"),
        (fails("dead_letters"), {"dead_letters": {"lanes": {"install": 1}}}, "dead_letters"),
        (hangs("load", "install"), {}, "lane_slow"),
        (hangs("load", "install", "IO: WALSync"), {}, "lane_slow"),
        (hangs("load", "install", "IPC: SyncRep", "COMMIT waits", "Bring it."), {}, "lane_slow"),
        *((fails(name, "x"), {}, f"{name}_failing") for name in WORK),
        *((hangs(name), {}, f"{name}_slow") for name in WORK),
        (fails("a part of a newer release", "x"), {}, "a part of a newer release_failing"),
    ],
)  # fmt: skip
def test_states(wrong: dict[str, Any], changes: dict[str, Any], state: str) -> None:
    shown = summary(status(wrong, **changes))
    assert (shown["state"], shown["also"]) == (state, [])
    assert shown["text"].endswith(".")
    assert str(wrong["error"] or wrong["waits_for"] or "") in shown["text"]
    assert ("Bring it." in shown["text"]) == (wrong["waits_for"] == "IPC: SyncRep")


@pytest.mark.parametrize(
    ("product", "name"), [("MariaDB", "MariaDB"), ("the database", "The database")]
)
def test_the_words_name_the_database_in_use(product: str, name: str) -> None:
    down = summary(status(fails("database", "x"), database__product=product))
    assert down["text"].startswith(f"{name} does not answer (since 10:05 UTC): x.")
    slow = summary(status(hangs("load", "install", "a lock"), database__product=product))
    assert slow["text"].endswith(
        f"under way since 10:05 UTC: {name} waits (a lock). Its events are kept, 7 waiting."
    )


def test_what_a_wait_means_is_said_and_what_to_do() -> None:
    wait = "IPC: SyncRep", "COMMIT waits for the standby", "Bring the standby back."
    assert summary(status(hangs("load", "install", *wait)))["text"].endswith(
        "10:05 UTC: COMMIT waits for the standby (IPC: SyncRep). Bring the standby back. Its "
        "events are kept, 7 waiting."
    )
    older = hangs("load", "install", *wait)
    del older["meaning"], older["remedy"]
    assert "PostgreSQL waits (IPC: SyncRep). Its" in summary(status(older))["text"]


def test_the_worst_comes_first_and_the_rest_is_named_too() -> None:
    wrong = [
        fails("peers"), fails("leftovers", "20 messages"), hangs("heartbeat"),
        fails("load", "a lock", "install"), fails("books"),
    ]  # fmt: skip
    shown = summary(status(*wrong))
    assert shown["state"] == "unbalanced"
    assert [re.split(r" \(?since", text)[0] for text in shown["also"]] == [
        "Event type install can't be loaded",
        "The heartbeat has been under way",
        "A process that died has left events in the journal",
        "No answer from web2:4711, web3:12",
    ]


@pytest.mark.parametrize(
    ("lanes", "words"),
    [
        ({"install": 1, "purchase": 0}, "1 event is a dead letter (install 1), since 10:05 UTC. "
         "PostgreSQL refused it, and it is kept. See why"),
        ({"a": 2, "b": 1200}, "1,202 events are dead letters (b 1,200, a 2), since"),
        (dict.fromkeys("abcde", 1), "5 events are dead letters (a 1, b 1, c 1, and 2 more types)"),
    ],
)  # fmt: skip
def test_dead_letters_are_counted_by_lane(lanes: dict[str, int], words: str) -> None:
    shown = summary(status(fails("dead_letters"), dead_letters={"lanes": lanes}))
    assert shown["text"].startswith(words)
    assert "by datapipe dead list;" in shown["text"]


def test_dead_letters_that_another_process_knows_to_be_gone() -> None:
    for counted in ({"lanes": {"install": 0}}, {"lanes": {}}, None):
        shown = summary(status(fails("dead_letters"), dead_letters=counted))
        assert shown["state"] == "healthy"


@pytest.mark.parametrize(
    ("kind", "ended", "words"),
    [
        ("journal", ["a:1"], "One process ended at 10:05 UTC: a:1. Its events are taken over "
                             "within 35 s; nothing need be done."),
        ("ironmq", ["a:1", "b:2"], "2 processes ended at 10:05 UTC: a:1, b:2. Their events are "
                                   "taken over within 45 s; nothing need be done."),
        ("none", ["a:1"], "One process ended at 10:05 UTC: a:1. What was held in memory there is "
                          "lost."),
    ],
)  # fmt: skip
def test_a_process_that_ended(kind: str, ended: list[str], words: str) -> None:
    shown = summary(status(fails("ended", ", ".join(ended)), ended=ended, mirror__kind=kind))
    assert shown["text"] == words


def test_what_follows_from_something_worse_is_not_named() -> None:
    wrong = [
        fails("ingest", "the mirror does not work"), fails("mirror", "x"), fails("append", "x"),
        fails("room", "99% used"), fails("database", "x"), fails("heartbeat", "x"),
        fails("load", "x", "install"), fails("recovery", "x"), hangs("removal"), hangs("upkeep"),
        fails("peers"),
    ]  # fmt: skip
    shown = summary(status(*wrong))
    assert shown["state"] == "refusing"
    assert [text.split(" (since")[0] for text in shown["also"]] == ["PostgreSQL does not answer"]


def test_what_failed_before_its_cause_was_over_is_not_named() -> None:
    """The database is back, and the next heartbeat has not been sent yet."""
    failed = fails("heartbeat", "x") | {"since": LONG_SINCE, "at": LONG_SINCE}
    assert summary(status(part("database"), failed))["state"] == "healthy"
    again = failed | {"at": NOW}
    assert summary(status(part("database"), again))["state"] == "heartbeat_failing"


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
