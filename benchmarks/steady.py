"""A fixed rate of single events over 64 connections, sent whether they are answered or not.

Latency counts from the moment when an event was due, so that waiting in the generator counts too:
it sleeps in whole milliseconds, hence the half millisecond that bare aiohttp has at any rate. The
lag is seen by PostgreSQL: the time of the commit less `received_at`, of all rows that are visible
when the time is over. It is meant to be long at the default settings: datapipe loads a lane when
16 MiB of rows wait, when half of the memory for waiting segments is in use (single events make
many small segments), or after 300 s. `make run` sets `load_interval` to 5 and `load_min_interval`
to 1. A peer that writes before it answers has no lag beyond its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import servers
from benchmarks.events import TABLE
from benchmarks.generator import paced, wrk
from benchmarks.loads import SINGLE_BODIES, WARM_UP_S, database, opened
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals
from benchmarks.peers import PEERS
from benchmarks.servers import Server
from benchmarks.single import BARE
from tests.postgres import Postgres

TITLE = "A steady rate"
RATE = 5000
CONNECTIONS = 64
_OURS = "datapipe"
_AS_RUN = "datapipe, as make run sets it"
_DRAWN = ["p50_ms", "p99_ms"]
_SOON = {"load_interval": 5, "load_min_interval": 1}
_LAGS = ("lag_p50_s", "lag_p99_s", "lag_max_s")
_LAG = f"""
    SELECT percentile_cont(ARRAY[0.5, 0.99, 1]) WITHIN GROUP
        (ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - received_at))
    FROM {TABLE}
"""


def measure(bench: Bench) -> Iterator[Contest]:
    postgres = Postgres(fsync="on", track_commit_timestamp="on")
    try:
        postgres.start()
        name = f"{RATE:,} events a second for {bench.minute:.0f} s"
        rivals = _rivals(postgres, bench.minute)
        yield in_turn(name, rivals, bench, memory_goals("steady", _OURS, _AS_RUN), _DRAWN)
    finally:
        postgres.remove()
    goal = Goal("p99 ms of the answer at half of the top rate", _OURS, figure="p99_ms", most=10)
    half = _Half(bench)
    rivals = {_OURS: half.ours, f"{BARE} at the same rate": half.bare}
    goals = [goal, *memory_goals("steady", _OURS)]
    yield in_turn("half of the top rate", rivals, bench, goals, _DRAWN)


def _rivals(postgres: Postgres, seconds: float) -> dict[str, Callable[[], Sample]]:
    def ours(**settings: Any) -> Sample:
        with database(postgres) as url, servers.datapipe(url, **settings) as server:
            sample = _paced(server, RATE, seconds)
            ((lags,),) = postgres.execute(url, _LAG)  # None: no row is there yet
            return sample | dict(zip(_LAGS, map(float, lags or ()), strict=False))

    def peer() -> Sample:
        with opened(PEERS[0], postgres) as (server, _):
            return _paced(server, RATE, seconds)

    return {
        _OURS: ours,
        _AS_RUN: lambda: ours(**_SOON),
        PEERS[0].name: peer,
    }


class _Half:
    """Half of what datapipe has just answered at most."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._rate = 0.0

    def ours(self) -> Sample:
        with database(self._bench.postgres) as url, servers.datapipe(url) as server:
            wrk(server.url, SINGLE_BODIES, CONNECTIONS, WARM_UP_S)
            top = wrk(server.url, SINGLE_BODIES, CONNECTIONS, self._bench.seconds)
            self._rate = top.rate / 2
            return _paced(server, self._rate, self._seconds) | {"top_rate": top.rate}

    def bare(self) -> Sample:
        with servers.bare() as server:
            return _paced(server, self._rate, self._seconds)

    @property
    def _seconds(self) -> float:
        return min(20, self._bench.minute)  # so that a load falls into it


def _paced(server: Server, rate: float, seconds: float) -> Sample:
    wrk(server.url, SINGLE_BODIES, CONNECTIONS, WARM_UP_S)
    cpu_s = server.cpu_s()
    load = paced(server.url, SINGLE_BODIES, CONNECTIONS, rate, seconds)
    cpu_s = server.cpu_s() - cpu_s
    return {
        "rate": load.rate,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "cpu_s_per_million": cpu_s / load.requests * 1e6,
        "peak_mb": server.memory_mb("VmHWM"),
        "server_cores": cpu_s / load.seconds,
        "generator_cores": load.cores,
    }
