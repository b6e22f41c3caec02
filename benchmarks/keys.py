"""Single events, with a new `Idempotency-Key` each, and without.

wrk builds each request anew in both cases, so the generator costs the same. *Until committed* is
the rate at which loads keep up: all events, by the time from the first POST until all are in the
table. With keys the ledger gets two more rows per event.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from benchmarks import servers
from benchmarks.generator import keyed
from benchmarks.loads import SINGLE_BODIES, WARM_UP_S, database, figures, rows
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals

TITLE = "Idempotency keys"
CONNECTIONS = (64, 256)
_WITHOUT, _WITH = "without a key", "a fresh key each"


def goals() -> list[Goal]:
    ratio = Goal("single, a fresh Idempotency-Key each / without", _WITH, _WITHOUT, least=0.7)
    return [ratio, *memory_goals("keys", _WITH)]


def measure(bench: Bench) -> Iterator[Contest]:
    for connections in CONNECTIONS:
        rivals = {
            name: partial(_single, bench, connections, keys=name == _WITH)
            for name in (_WITHOUT, _WITH)
        }
        drawn = ["rate", "committed_rate"]
        yield in_turn(f"{connections} connections", rivals, bench, goals(), drawn)


def _single(bench: Bench, connections: int, keys: bool) -> Sample:
    """Raises: RuntimeError: not all that was answered is in the table."""
    with database(bench.postgres) as url, servers.datapipe(url) as server:
        keyed(server.url, SINGLE_BODIES, connections, WARM_UP_S, keys=keys)
        server.load()
        before, cpu_s, began = rows(bench.postgres, url), server.cpu_s(), time.perf_counter()
        load = keyed(server.url, SINGLE_BODIES, connections, bench.seconds, keys=keys)
        cpu_s = server.cpu_s() - cpu_s
        server.load()
        took, stored = time.perf_counter() - began, rows(bench.postgres, url) - before
        if stored < load.requests:
            raise RuntimeError(f"{load.requests} events answered with 200, {stored} in the table")
        sample = figures(server, load, load.requests, load.seconds, cpu_s)
    return sample | {"committed_rate": stored / took}
