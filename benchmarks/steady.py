"""A fixed rate of single events over 64 connections, sent whether they are answered or not.

*Inside* is measured by the service itself: from a POST's arrival until its answer is written,
without the generator's and the kernel's part (`datapipe_request_seconds`). The generator waits too
while PostgreSQL uses the cores for a load. So for half of the top rate bare aiohttp is measured as
well, while the rows of datapipe's loads are copied beside it, as many at the same moments.

Latency counts from the moment when an event was due, so waiting in the generator counts too: it
sleeps in whole milliseconds, hence the half millisecond that even bare aiohttp has. The lag is seen
by PostgreSQL: the time of the commit less `received_at`, of all rows that are visible at the end.
At the default settings it is long on purpose: datapipe loads an event type when 16 MiB of rows
wait, when half of the memory for waiting events is in use (which counts the overhead of single
ones), or after 300 s. `make run` sets `load_interval` to 5 and `load_min_interval` to 1. A peer
that writes before it answers has no lag beyond its answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from benchmarks import servers
from benchmarks.copying import Burst, beside
from benchmarks.events import TABLE, as_rows, crashes
from benchmarks.generator import paced, wrk
from benchmarks.loads import SINGLE_BODIES, WARM_UP_S, database, opened
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals, percentile
from benchmarks.peers import PEERS
from benchmarks.servers import Server
from benchmarks.single import BARE
from datapipe.settings import Settings
from tests.postgres import Postgres

TITLE = "A steady rate"
RATE = 5000
CONNECTIONS = 64
_OURS = "datapipe"
_AS_RUN = "datapipe, as make run sets it"
_BESIDE = f"{BARE}, an equal COPY beside it"
_ALONE = f"{BARE}, nothing beside it"
_INSIDE = "p99 ms inside the service at half of the top rate, while loads run"
_OUTSIDE = f"p99 at half of the top rate, while loads run / {_BESIDE}"
_HALF_S = 20  # at least; longer where a load would not fall into it
_ROW_BYTES = len(as_rows(crashes(1000))) / 1000
_DRAWN = ["p50_ms", "p99_ms"]
_SOON = {"load_interval": 5, "load_min_interval": 1}
REQUESTS = "datapipe_request_seconds"
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
    half = _Half(bench)
    rivals = {_OURS: half.ours, _BESIDE: half.beside, _ALONE: half.alone}
    drawn = ["p99_ms", "inside_p99_ms"]
    yield in_turn("half of the top rate, while loads run", rivals, bench, goals(), drawn)


def goals() -> list[Goal]:
    """Of half of the top rate."""
    return [
        Goal(_INSIDE, _OURS, figure="inside_p99_ms", most=5),
        Goal(_OUTSIDE, _OURS, _BESIDE, "p99_ms", most=1.5),
        *memory_goals("steady", _OURS),
    ]


def _rivals(postgres: Postgres, seconds: float) -> dict[str, Callable[[], Sample]]:
    def ours(**settings: Any) -> Sample:
        with database(postgres) as url, servers.datapipe(url, **settings) as server:
            sample = _paced(server, RATE, seconds, inside=True)
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
    """Half of what datapipe has just answered at most, and its loads for who comes after it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._rate = self._seconds = 0.0
        self._loads: list[Burst] = []

    def ours(self) -> Sample:
        """Raises: RuntimeError: no load fell into the run."""
        with database(self._bench.postgres) as url, servers.datapipe(url) as server:
            wrk(server.url, SINGLE_BODIES, CONNECTIONS, WARM_UP_S)
            top = wrk(server.url, SINGLE_BODIES, CONNECTIONS, self._bench.seconds)
            server.load()
            self._rate = top.rate / 2
            a_load_s = Settings().load_trigger_bytes / _ROW_BYTES / self._rate
            self._seconds = max(_HALF_S, 2 * a_load_s)
            began = time.time()
            sample = _paced(server, self._rate, self._seconds, inside=True)
            self._loads = _loads(server, began)
        if not self._loads:
            raise RuntimeError(f"no load within {self._seconds:.0f} s")
        copied = sum(rows for _, rows in self._loads)
        return sample | {"top_rate": top.rate, "loads": len(self._loads), "loaded": copied}

    def beside(self) -> Sample:
        with servers.bare() as server, beside(self._bench.postgres, self._loads):
            return _paced(server, self._rate, self._seconds)

    def alone(self) -> Sample:
        with servers.bare() as server:
            return _paced(server, self._rate, self._seconds)


def _loads(server: Server, since: float) -> list[Burst]:
    """When each load began, in seconds since then (Unix time), and its rows."""
    found = []
    for load in server.logged("segments loaded"):
        began = datetime.fromisoformat(load["timestamp"]).timestamp() - load["seconds"] - since
        if began >= 0:
            found.append((began, load["rows"]))
    return sorted(found)


def _paced(server: Server, rate: float, seconds: float, inside: bool = False) -> Sample:
    """Args: inside: with what a datapipe says of the same requests."""
    wrk(server.url, SINGLE_BODIES, CONNECTIONS, WARM_UP_S)
    before = server.buckets(REQUESTS) if inside else {}
    cpu_s = server.cpu_s()
    load = paced(server.url, SINGLE_BODIES, CONNECTIONS, rate, seconds)
    cpu_s = server.cpu_s() - cpu_s
    sample = {
        "rate": load.rate,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "cpu_s_per_million": cpu_s / load.requests * 1e6,
        "peak_mb": server.memory_mb("VmHWM"),
        "server_cores": cpu_s / load.seconds,
        "generator_cores": load.cores,
    }
    if inside:
        sample |= taken(server.buckets(REQUESTS), before)
    return sample


def taken(now: Mapping[float, float], before: Mapping[float, float]) -> Sample:
    """What requests took inside the service, of those between two looks at `REQUESTS`."""
    between = {le: n - before[le] for le, n in now.items()}
    shares = {"inside_p50_ms": 0.5, "inside_p99_ms": 0.99}
    found = {figure: percentile(between, share) for figure, share in shares.items()}
    return {figure: value * 1e3 for figure, value in found.items() if value is not None}
