"""Several processes on one port (`reuse_port`), with one `data_dir` and one database.

Single events, as above. The generator and PostgreSQL use the same cores, so the tables say what an
event costs in each: CPU seconds per million events, until all are committed. Once all of the
*machine's cores* are busy, a further process adds nothing but its own costs. An event costs more
if each process has fewer connections, because fewer events share a write to the journal. CPU,
memory and cores of the service are those of all its processes together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import servers
from benchmarks.generator import wrk
from benchmarks.loads import SINGLE_BODIES, WARM_UP_S, database, figures, rows, single
from benchmarks.measure import Bench, Contest, Sample, in_turn, memory_goals

TITLE = "Several processes"
_CONNECTIONS = 256


def measure(bench: Bench) -> Iterator[Contest]:
    counts = {1: "1 process", 2: "2 processes", 4: "4 processes"}
    goals = memory_goals("one process", counts[1])
    drawn = ["rate", "cpu_s_per_million"]
    all_of, each = f"{_CONNECTIONS} connections", f"{_CONNECTIONS} connections a process"
    rivals = {name: partial(_counted, bench, n, _CONNECTIONS) for n, name in counts.items()}
    yield in_turn(all_of, rivals, bench, goals, drawn)
    rivals = {name: partial(_counted, bench, n, n * _CONNECTIONS) for n, name in counts.items()}
    yield in_turn(each, rivals, bench, goals, drawn)


def _counted(bench: Bench, processes: int, connections: int) -> Sample:
    """What an event costs in the service, in the generator and in PostgreSQL."""
    postgres = servers.postgres(bench.postgres)
    with database(bench.postgres) as url, servers.datapipe(url, processes) as server:
        wrk(server.url, SINGLE_BODIES, connections, WARM_UP_S)
        server.load()
        cpu_s, postgres_s, busy_s = server.cpu_s(), postgres.cpu_s(), servers.busy_s()
        load = wrk(server.url, SINGLE_BODIES, connections, bench.seconds)
        busy_s = servers.busy_s() - busy_s
        sample = figures(server, load, load.requests, load.seconds, server.cpu_s() - cpu_s)
        server.load()
        cpu_s, postgres_s = server.cpu_s() - cpu_s, postgres.cpu_s() - postgres_s
    millions = load.requests / 1e6
    return sample | {
        "cpu_s_per_million": cpu_s / millions,
        "generator_s_per_million": load.cpu_s / millions,
        "postgres_s_per_million": postgres_s / millions,
        "machine_cores": busy_s / load.seconds,
    }


def served(
    bench: Bench, processes: int, connections: int, query: str = "", **settings: Any
) -> Sample:
    """Single events to so many processes; all that was answered is in the table afterwards.

    Args: query: of each POST. settings: over the defaults.
    Raises: RuntimeError: it is not.
    """
    with database(bench.postgres) as url:
        with servers.datapipe(url, processes, **settings) as server:
            sample, answered = single(server, connections, bench.seconds, query)
        if (stored := rows(bench.postgres, url)) < answered:
            raise RuntimeError(f"{answered} events answered with 200, {stored} in the table")
    return sample
