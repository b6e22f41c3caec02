"""What IronMQ costs while little happens: hours and days on a simulated clock."""

from __future__ import annotations

from benchmarks.ironmq_simulated import DAY_GOAL, HOUR_GOAL, LANES, day, hour


def test_an_event_a_second_for_an_hour() -> None:
    requests = hour()
    assert requests.total() <= HOUR_GOAL, requests
    assert 3600 / 7 < requests["post"] < 3600 / 5


def test_an_idle_process_for_a_day() -> None:
    requests = day()
    assert requests.total() <= DAY_GOAL * LANES, requests
    assert set(requests) == {"list", "info"}
