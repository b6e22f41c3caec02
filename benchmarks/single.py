"""One event a POST over connections that are kept alive, durable before the answer.

*Bare aiohttp* is an application with one handler that reads the body and answers a constant, on the
same event loop. *The generator's limit* is a server that does not even read the request: what wrk
can send at most. The others are what one would build or take instead, each
[told of by itself](../benchmarks/peers/README.md).
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
_ALL_CORES = f"datapipe, {CORES} processes"


def goals() -> list[Goal]:
    made = [Goal("single, one process / bare aiohttp", _OURS, BARE, least=0.9)]
    for peer, ours, least in zip(
        PEERS, (_ALL_CORES, _ALL_CORES, _OURS, _OURS, _OURS), (1.5, 1, 1.7, 3, 5), strict=False
    ):
        who = "one process a core" if ours == _ALL_CORES else "one process"
        made.append(Goal(f"single, {who} / {peer.name}", ours, peer.name, least=least))
    return made + memory_goals("single", _OURS)


def measure(bench: Bench) -> Iterator[Contest]:
    for connections in CONNECTIONS:
        name, rivals = f"{connections} connections", _rivals(bench, connections)
        yield in_turn(name, rivals, bench, goals(), undrawn=[LIMIT])


def _rivals(bench: Bench, connections: int) -> dict[str, Callable[[], Sample]]:
    def bare() -> Sample:
        with servers.bare() as server:
            return single(server, connections, bench.seconds)[0]

    def limit() -> Sample:
        with servers.sink() as server:
            return single(server, connections, bench.seconds)[0]

    return {
        _OURS: partial(served, bench, 1, connections),
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
