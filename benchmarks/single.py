"""single: one event a POST, durable before the answer, beside a bare aiohttp application."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from benchmarks import servers
from benchmarks.events import TABLE, as_json, crashes
from benchmarks.generator import wrk
from benchmarks.measure import Contest, Sample, in_turn
from benchmarks.servers import Server
from tests.postgres import Postgres

CONNECTIONS = (64, 256)
GOAL = 0.6
_WARM_UP_S = 1
_BODIES = [as_json(crash) for crash in crashes(1000)]


def contests(
    postgres: Postgres, runs: int, seconds: float, say: Callable[[str], None]
) -> list[Contest]:
    """One contest for each number of connections."""

    def contest(connections: int) -> Contest:
        def ours() -> Sample:
            url = postgres.create_database()
            sample, answered = _run(servers.datapipe(url), connections, seconds)
            ((rows,),) = postgres.execute(url, f"SELECT count(*) FROM {TABLE}")
            if rows < answered:
                raise RuntimeError(f"{answered} events answered with 200, {rows} in the table")
            postgres.execute(postgres.url("postgres"), f"DROP DATABASE {url.rpartition('/')[2]}")
            return sample

        rivals = {
            "datapipe": ours,
            "bare aiohttp": lambda: _run(servers.bare(), connections, seconds)[0],
        }
        name = f"single, {connections} connections"
        return in_turn(name, rivals, runs, {"bare aiohttp": GOAL}, say)

    return [contest(connections) for connections in CONNECTIONS]


def _run(
    opened: AbstractContextManager[Server], connections: int, seconds: float
) -> tuple[Sample, int]:
    """One run against a fresh server, and the number of POSTs that it answered in all."""
    with opened as server:
        warm_up = wrk(server.url, _BODIES, connections, _WARM_UP_S)
        cpu_s = server.cpu_s()
        load = wrk(server.url, _BODIES, connections, seconds)
        cpu_s = server.cpu_s() - cpu_s
        sample = Sample(
            load.requests / load.seconds,
            load.p50_ms,
            load.p99_ms,
            cpu_s / load.requests * 1e6,
            server.memory_mb("VmHWM"),
            cpu_s / load.seconds,
            load.cpu_s / load.seconds,
        )
    return sample, warm_up.requests + load.requests
