from __future__ import annotations

from datapipe.pipeline.records import (
    BODY_SHOWN,
    LOADS,
    REFUSALS,
    Load,
    Rate,
    Records,
    Refusal,
    shown,
)


def test_only_the_last_ones_are_kept() -> None:
    recent = Records()
    for number in range(50):
        recent.loaded(Load("a", rows=number))
        recent.refused(Refusal("bad_json", 3, "no", str(number)))
    assert [load["rows"] for load in recent.loads()] == list(range(49, 49 - LOADS, -1))
    assert [each["request_id"] for each in recent.refusals()][:2] == ["49", "48"]
    assert len(recent.refusals()) == REFUSALS


def test_an_outage_does_not_push_out_what_was_loaded() -> None:
    recent = Records()
    recent.loaded(Load("a", rows=1))
    for _ in range(100):
        recent.loaded(Load("a", error="refused"))
        recent.loaded(Load("b", error="refused"))
    told = [(load["lane"], load["rows"], load["tries"]) for load in recent.loads()]
    assert told == [("b", 0, 100), ("a", 0, 100), ("a", 1, 1)]


def test_refusals_for_want_of_room_are_one_entry() -> None:
    recent = Records()
    recent.refused(Refusal("bad_json", 3, "no", "1"))
    for number in range(100):
        recent.refused(Refusal("busy", 9, "full", str(number)))
    assert [(each["reason"], each["events"]) for each in recent.refusals()] == [
        ("busy", 100),
        ("bad_json", 1),
    ]


def test_a_body_is_shortened_and_text() -> None:
    assert shown(b"{}") == "{}"
    assert shown(b"\xff{") == "\ufffd{"
    assert len(shown(b"x" * 1_000_000)) == BODY_SHOWN + 1
    assert shown("ä".encode() * 1000) == "ä" * BODY_SHOWN + "…"


def test_a_rate_is_over_its_window() -> None:
    rate = Rate(60.0)
    assert rate.per_second() == 0
    rate.take(0, 0.0)
    assert rate.per_second() == 0
    rate.take(100, 10.0)
    assert rate.per_second() == 10
    rate.take(50, 110.0)
    assert rate.per_second() == -0.5
    for second in range(111, 1000):
        rate.take(50, float(second))
    assert rate.per_second() == 0
    assert len(rate._readings) < 65
