"""idle: resident memory of a service that has nothing to do."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks import servers
from benchmarks.events import as_array, crashes
from benchmarks.generator import post_all
from tests.postgres import Postgres

GOAL_MB = 80.0
_SETTLE_S = 4.0


@dataclass(slots=True)
class Idle:
    """MB: some seconds after the start, and some seconds after 10,000 events were loaded."""

    started_mb: float
    warm_mb: float


def measure(postgres: Postgres) -> Idle:
    with servers.datapipe(postgres.create_database()) as server:
        time.sleep(_SETTLE_S)
        started_mb = server.memory_mb()
        post_all(server.url, [as_array(crashes(1000, seed)) for seed in range(10)], 4)
        server.load()
        time.sleep(_SETTLE_S)
        return Idle(started_mb, server.memory_mb())
