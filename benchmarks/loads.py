"""The two kinds of load that most parts use, on a server that is already open, and databases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from urllib.request import Request, urlopen

from benchmarks.events import COLUMNS, TABLE, as_json, crashes
from benchmarks.generator import Load, wrk
from benchmarks.measure import Sample
from benchmarks.peers import Peer
from benchmarks.servers import Server
from tests.postgres import Postgres

BATCH_CONNECTIONS = 8
WARM_UP_S = 1
SINGLE_BODIES = [as_json(crash) for crash in crashes(1000)]


def warm_up(url: str, bodies: Sequence[bytes]) -> None:
    """Send each body once, where a second of wrk would be too much."""
    for body in bodies:
        with urlopen(Request(url, body), timeout=60):
            pass


@contextmanager
def database(postgres: Postgres) -> Iterator[str]:
    """The URL of an empty one, with no checkpoint left over from the run before; it is dropped."""
    url = postgres.create_database()
    postgres.execute(url, "CHECKPOINT")
    try:
        yield url
    finally:
        name = url.rpartition("/")[2]
        postgres.execute(postgres.url("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


def rows(postgres: Postgres, url: str) -> int:
    ((count,),) = postgres.execute(url, f"SELECT count(*) FROM {TABLE}")
    return int(count)


@contextmanager
def opened(peer: Peer, postgres: Postgres) -> Iterator[tuple[Server, Callable[[], int]]]:
    """A peer with its table in a database of its own, and what counts the rows."""
    with database(postgres) as url:
        postgres.execute(url, f"CREATE TABLE {TABLE} ({COLUMNS})")
        with peer.open(url) as server:
            yield server, partial(rows, postgres, url)


def single(server: Server, connections: int, seconds: float, query: str = "") -> tuple[Sample, int]:
    """One event a POST: the figures, and how many POSTs were answered in all."""
    url = f"{server.url}/{query}"
    warm_up = wrk(url, SINGLE_BODIES, connections, WARM_UP_S)
    cpu_s = server.cpu_s()
    load = wrk(url, SINGLE_BODIES, connections, seconds)
    cpu_s = server.cpu_s() - cpu_s
    return figures(server, load, load.requests, load.seconds, cpu_s), (
        warm_up.requests + load.requests
    )


def batches(
    server: Server,
    bodies: Sequence[bytes],
    events: int,
    seconds: float,
    *,
    settle: Callable[[], object],
    count: Callable[[], int] | None,
    encoding: str = "",
    connections: int = BATCH_CONNECTIONS,
) -> Sample:
    """Many events a POST, from the first POST until the last row is committed.

    Args: events: of a body. settle: returns once all is committed. count: of what is committed;
        None where nothing is stored: what was answered counts.
    Raises: RuntimeError: less is committed than was answered.
    """
    wrk(server.url, bodies, connections, WARM_UP_S, encoding)
    settle()
    before = count() if count else 0
    cpu_s = server.cpu_s()
    load = wrk(server.url, bodies, connections, seconds, encoding)
    sent = time.perf_counter()
    settle()
    took = load.seconds + time.perf_counter() - sent
    cpu_s = server.cpu_s() - cpu_s
    answered = load.requests * events
    stored = count() - before if count else answered
    if stored < answered:
        raise RuntimeError(f"{answered} events were answered with 200, {stored} are committed")
    return figures(server, load, stored, took, cpu_s)


def figures(server: Server, load: Load, events: int, seconds: float, cpu_s: float) -> Sample:
    """Those that most runs have. Args: seconds: of all of it; cpu_s: that the server took."""
    return {
        "rate": events / seconds,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "cpu_s_per_million": cpu_s / events * 1e6,
        "peak_mb": server.memory_mb("VmHWM"),
        "server_cores": cpu_s / seconds,
        "generator_cores": load.cores,
    }
