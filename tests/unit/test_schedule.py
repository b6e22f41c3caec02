"""A lane's turn: what belongs to it, and when it is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datapipe.pipeline.schedule import Schedule
from datapipe.settings import Settings
from datapipe.sinks import Loaded


async def test_a_turn_ends_though_events_were_lost() -> None:
    """Ten came, two are nowhere: the intervals hold all the same."""
    lane: Any = SimpleNamespace(
        total_in=10, total_out=0, waiting=SimpleNamespace(events=8, bytes=80)
    )
    schedule = Schedule(lane, 0.0)
    schedule.begin(1.0)
    lane.total_in, lane.total_out, lane.waiting.events = 13, 8, 3  # three came meanwhile
    schedule.succeeded(Loaded(8), 0.1, 2.0)
    assert schedule.due_at(Settings(load_interval=300)) == 302.0
