"""Resident memory of a service that has nothing to do.

Some seconds after its start, and some seconds after a second of batches (about a million events)
was loaded. What each load above takes at most stands in its own table.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import servers
from benchmarks.events import as_array, batches
from benchmarks.generator import wrk
from benchmarks.loads import database
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn

TITLE = "Memory when idle"
_OURS = "datapipe"
_SETTLE_S = 6.0  # housekeeping looks every 5 s


def measure(bench: Bench) -> Iterator[Contest]:
    goals = [
        Goal("idle after the start, MB", _OURS, figure="started_mb", most=60, every=True),
        Goal("idle after a million events, MB", _OURS, figure="warm_mb", most=60, every=True),
    ]
    drawn = ["started_mb", "warm_mb"]
    yield in_turn("idle", {_OURS: lambda: _idle(bench)}, bench, goals, drawn)


def _idle(bench: Bench) -> Sample:
    with database(bench.postgres) as url, servers.datapipe(url) as server:
        time.sleep(_SETTLE_S)
        started_mb = server.memory_mb()
        wrk(server.url, [as_array(batch) for batch in batches(1000, 20)], 8, 1)
        server.load()
        time.sleep(_SETTLE_S)
        return {"started_mb": started_mb, "warm_mb": server.memory_mb()}
