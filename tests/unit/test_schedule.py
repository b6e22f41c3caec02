"""A lane's turn: what belongs to it, and when it is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datapipe.health import Health
from datapipe.pipeline.schedule import Schedule, now
from datapipe.settings import Settings


async def test_a_turn_ends_though_events_were_lost() -> None:
    """Ten came, two are nowhere: the intervals hold all the same."""
    lane: Any = SimpleNamespace(
        total_out=0, waiting=SimpleNamespace(events=8, bytes=80), health=Health(), awaited=0
    )
    schedule = Schedule(lane)
    schedule.begin()
    lane.total_out, lane.waiting.events = 8, 3  # three came meanwhile
    schedule.succeeded(8)
    assert 299 < schedule.due_at(Settings(load_interval=300)) - now() <= 300
