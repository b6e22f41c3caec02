"""One event per POST over connections that are kept alive, durable before the answer.

*Bare aiohttp* is an application with one handler that reads the body and answers a constant, on the
same event loop. *The generator's limit* is a server that does not even read the request: the most
that wrk can send. The others are what you might build or use instead
([each described](../benchmarks/peers/README.md)).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import servers
from benchmarks.loads import opened, single
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals
from benchmarks.peers import PEERS, Peer
from benchmarks.processes import served

TITLE = "Single events"
CONNECTIONS = (64, 256)
CORES = len(os.sched_getaffinity(0))
LIMIT = "the generator's limit"
BARE = "bare aiohttp"
_OURS = "datapipe"
_KEYED = "datapipe, four named keys with rates"
_KEYS = [{"name": f"k{i}", "key": f"a long random text, {i}", "rate": 1e6} for i in range(4)]
_ALL_CORES = f"datapipe, {CORES} processes"


def goals(connections: int) -> list[Goal]:
    def goal(ours: str, rival: str, least: float, which: str = "one process") -> Goal:
        return Goal(
            f"single, {connections} connections, {which} / {rival}", ours, rival, least=least
        )

    gathered, all_cores, each, tornado, fastapi = (peer.name for peer in PEERS[:5])
    at_64 = connections == 64
    return [
        goal(_OURS, BARE, 1.6 if at_64 else 2.2),
        goal(_OURS, gathered, 1.15 if at_64 else 1.35),
        Goal(f"CPU of a single event / {BARE}", _OURS, BARE, "cpu_s_per_million", most=0.6),
        goal(_ALL_CORES, all_cores, 1, "one process a core"),
        Goal(
            f"CPU of a single event, {_KEYED} / none", _KEYED, _OURS, "cpu_s_per_million", most=1.05
        ),
        goal(_OURS, each, 1.7),
        goal(_OURS, tornado, 3),
        goal(_OURS, fastapi, 5),
        *memory_goals("single", _OURS),
    ]


def measure(bench: Bench) -> Iterator[Contest]:
    for connections in CONNECTIONS:
        name, rivals = f"{connections} connections", _rivals(bench, connections)
        yield in_turn(name, rivals, bench, goals(connections), undrawn=[LIMIT])


def _rivals(bench: Bench, connections: int) -> dict[str, Callable[[], Sample]]:
    def bare() -> Sample:
        with servers.bare() as server:
            return single(server, connections, bench.seconds)[0]

    def limit() -> Sample:
        with servers.sink() as server:
            return single(server, connections, bench.seconds)[0]

    return {
        _OURS: partial(served, bench, 1, connections),
        _KEYED: partial(
            served, bench, 1, connections, "?key=a%20long%20random%20text,%203", ingest_keys=_KEYS
        ),
        BARE: bare,
        LIMIT: limit,
        _ALL_CORES: partial(served, bench, CORES, connections),
        **{_named(peer): partial(_peer, peer, bench, connections) for peer in PEERS},
    }


def _named(peer: Peer) -> str:
    return peer.name if peer.durable else f"{peer.name} (not durable)"


def _peer(peer: Peer, bench: Bench, connections: int) -> Sample:
    with opened(peer, bench.postgres) as (server, count):
        sample, answered = single(server, connections, bench.seconds)
        peer.settle(server)
        if peer.durable and (stored := count()) < answered:
            raise RuntimeError(f"{answered} events answered, {stored} in the table")
    return sample
