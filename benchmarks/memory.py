"""Resident memory of a service that has nothing to do, installed as `make run` installs it.

Measured some seconds after its start, and some seconds after a million events, in batches of 1,000,
were loaded. The peak of each test above is in its own table.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import servers
from benchmarks.events import as_array, batches
from benchmarks.generator import wrk
from benchmarks.loads import BATCH_CONNECTIONS, database
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn

TITLE = "Memory when idle"
_OURS = "datapipe"
_EVENTS = 1_000_000
_SETTLE_S = 6.0  # housekeeping looks every 5 s


def measure(bench: Bench) -> Iterator[Contest]:
    drawn = ["started_mb", "warm_mb"]
    yield in_turn("idle", {_OURS: lambda: _idle(bench)}, bench, goals(), drawn)


def goals() -> list[Goal]:
    return [
        Goal("idle after the start, MB", _OURS, figure="started_mb", most=48, every=True),
        Goal("idle after a million events, MB", _OURS, figure="warm_mb", most=58, every=True),
    ]


def _idle(bench: Bench) -> Sample:
    """Raises: FileNotFoundError: `tools/bench-needs` has not made the environment."""
    python = str(servers.AS_RUN)
    with database(bench.postgres) as url, servers.datapipe(url, python=python) as server:
        time.sleep(_SETTLE_S)
        started_mb = server.memory_mb()
        bodies = [as_array(batch) for batch in batches(1000, 20)]
        while server.books()["accepted"] < _EVENTS:
            wrk(server.url, bodies, BATCH_CONNECTIONS, 1)
        server.load()
        time.sleep(_SETTLE_S)
        return {"started_mb": started_mb, "warm_mb": server.memory_mb()}
