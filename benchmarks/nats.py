"""NATS JetStream as the durable queue: three nodes, each stream on all of them; beside the journal.

With the *default sync* its servers flush every two minutes: an answer then means that two of three
have the event in memory. With *sync always* (`sync_interval: always`) two of three have it on disk.
All three nodes, the service, PostgreSQL and the generator share the cores, so the tables say what
an event costs in each: CPU seconds per million events, until all are committed. Once all of the
*machine's cores* are busy, a second process adds nothing but its own costs. MB are those of one
node, and of the service, after the run; *stored* is what waits to be loaded when sending ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from uuid import uuid4

from benchmarks import servers
from benchmarks.events import as_array, batches
from benchmarks.generator import wrk
from benchmarks.loads import (
    BATCH_CONNECTIONS,
    SINGLE_BODIES,
    WARM_UP_S,
    database,
    figures,
    rows,
)
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals
from tests.jetstream import NatsCluster

TITLE = "NATS"
CONNECTIONS = (64, 256)
_DEFAULT, _ALWAYS = "NATS (default sync)", "NATS (sync always)"
SYNC: dict[str, str | None] = {_DEFAULT: None, _ALWAYS: "always"}
_JOURNAL = "journal"
_ONE, _TWO = "1 process", "2 processes"
_EVENTS = 1000  # of a POST with many
_LEAST = {  # of the journal's rate: default, always
    64: (0.6, 0.45),
    256: (0.8, 0.7),
    _EVENTS: (0.75, 0.65),
}
_SETTLE_S = 60
# what stands in the table of costs alone
_SIZES = ("service_mb", "node_mb", "reserved_mb", "stored_mb")
_COSTS = ("cpu_s_per_million", "nats_s_per_million", "postgres_s_per_million", *_SIZES)

Clusters = Mapping[str, NatsCluster | None]


def goals(connections: int) -> list[Goal]:
    """Of single events."""
    return [
        *(
            Goal(f"single, {connections} connections, {name} / {_JOURNAL}", name, _JOURNAL,
                 least=least)
            for name, least in zip(SYNC, _LEAST[connections], strict=True)
        ),
        *memory_goals("NATS, single", *SYNC),
    ]  # fmt: skip


def batch_goals() -> list[Goal]:
    return [
        *(
            Goal(f"batches of 1,000 until committed, {name} / {_JOURNAL}", name, _JOURNAL,
                 "committed_rate", least=least)
            for name, least in zip(SYNC, _LEAST[_EVENTS], strict=True)
        ),
        *memory_goals("NATS, batches", *SYNC),
    ]  # fmt: skip


def process_goals(name: str) -> list[Goal]:
    """Args: name: how the servers flush, of `SYNC`."""
    return [Goal(f"{name}, 2 processes / 1", _TWO, _ONE, least=1.3)]


def measure(bench: Bench) -> Iterator[Contest]:
    with _clusters() as clusters:
        table: dict[str, list[Sample]] = {}
        for connections in CONNECTIONS:
            run = partial(_run, bench, SINGLE_BODIES, 1, connections)
            name = f"{connections} connections"
            contest = in_turn(name, _rivals(run, clusters), bench, goals(connections))
            table |= costs(f"single, {name}", contest)
            yield contest
        bodies = [as_array(batch) for batch in batches(_EVENTS)]
        run = partial(_run, bench, bodies, _EVENTS, BATCH_CONNECTIONS)
        drawn = ["committed_rate"]
        contest = in_turn("1,000 events a POST, as a JSON array", _rivals(run, clusters), bench,
                          batch_goals(), drawn)  # fmt: skip
        table |= costs("batches of 1,000", contest)
        yield contest
        yield Contest("What an event costs", table, drawn=[])
        run = partial(_run, bench, SINGLE_BODIES, 1, CONNECTIONS[-1])
        for name in SYNC:
            rivals = {
                _ONE: partial(run, clusters[name]),
                _TWO: partial(run, clusters[name], processes=2),
            }
            title = f"{name}, {CONNECTIONS[-1]} connections, one process and two"
            contest = in_turn(title, rivals, bench, process_goals(name))
            _take_out(contest, _SIZES)
            yield contest


@contextmanager
def _clusters() -> Iterator[Clusters]:
    """Three nodes for each way to flush, all on the disk that the journal is on."""
    with servers.work_folder() as folder, ExitStack() as stack:
        clusters: dict[str, NatsCluster | None] = {_JOURNAL: None}
        for name, sync in SYNC.items():
            own = folder / (sync or "default")
            clusters[name] = stack.enter_context(NatsCluster.running(own, sync=sync))
        yield clusters


def _rivals(
    run: Callable[[NatsCluster | None], Sample], clusters: Clusters
) -> dict[str, Callable[[], Sample]]:
    return {name: partial(run, cluster) for name, cluster in clusters.items()}


def costs(load: str, contest: Contest) -> dict[str, list[Sample]]:
    """Rows for the table of costs; their figures are taken out of the contest."""
    return {f"{load}, {name}": of for name, of in _take_out(contest, _COSTS).items()}


def _take_out(contest: Contest, names: Sequence[str]) -> dict[str, list[Sample]]:
    """Take figures out of a contest; what was taken, by rival."""
    return {
        rival: [{name: each.pop(name) for name in names if name in each} for each in samples]
        for rival, samples in contest.samples.items()
    }


def _run(
    bench: Bench,
    bodies: Sequence[bytes],
    events: int,
    connections: int,
    cluster: NatsCluster | None,
    processes: int = 1,
) -> Sample:
    """Args: events: of a body. cluster: None: with the journal.

    Raises: RuntimeError: not all that was answered is in the table.
    """
    postgres = servers.postgres(bench.postgres)
    nodes = [servers.Server(node.pid, node.url) for node in cluster.nodes] if cluster else []
    with (
        database(bench.postgres) as url,
        _streams(cluster) as settings,
        servers.datapipe(url, processes, **settings) as server,
    ):

        def settle(wanted: int) -> None:
            until = time.monotonic() + _SETTLE_S
            while True:  # another process may have some in hand, a new stream no leader yet
                with suppress(RuntimeError):
                    server.load()
                if rows(bench.postgres, url) >= wanted:
                    return
                if time.monotonic() > until:
                    raise RuntimeError(f"{wanted} events answered with 200, not all in the table")

        answered = wrk(server.url, bodies, connections, WARM_UP_S).requests * events
        settle(answered)
        cpu_s, postgres_s, nats_s = server.cpu_s(), postgres.cpu_s(), _cpu_s(nodes)
        busy_s, began = servers.busy_s(), time.perf_counter()
        load = wrk(server.url, bodies, connections, bench.seconds)
        busy_s = servers.busy_s() - busy_s
        stored = cluster.nodes[0].ask("/jsz") if cluster else {}
        sending_s, count = server.cpu_s() - cpu_s, load.requests * events
        settle(answered + count)
        took, millions = time.perf_counter() - began, count / 1e6
        sample = figures(server, load, count, load.seconds, sending_s)
        sample |= {
            "committed_rate": count / took,
            "machine_cores": busy_s / load.seconds,
            "cpu_s_per_million": (server.cpu_s() - cpu_s) / millions,
            "generator_s_per_million": load.cpu_s / millions,
            "postgres_s_per_million": (postgres.cpu_s() - postgres_s) / millions,
            "service_mb": server.memory_mb(),
        }
        if nodes:
            sample |= {
                "nats_s_per_million": (_cpu_s(nodes) - nats_s) / millions,
                "node_mb": max(node.memory_mb() for node in nodes),
                "reserved_mb": stored["reserved_storage"] / 1e6,
                "stored_mb": stored["storage"] / 1e6,
            }
        return sample


def _cpu_s(nodes: Sequence[servers.Server]) -> float:
    return sum(node.cpu_s() for node in nodes)


@contextmanager
def _streams(cluster: NatsCluster | None) -> Iterator[dict[str, str]]:
    """Settings with a prefix of its own; its streams, which reserve their bytes, are deleted."""
    if cluster is None:
        yield {}
        return
    prefix = f"bench_{uuid4().hex[:12]}"
    try:
        yield {**cluster.settings, "nats_prefix": prefix}
    finally:
        asyncio.run(cluster.delete_streams(prefix))
