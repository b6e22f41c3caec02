"""Several processes on one port (`reuse_port`), with one `data_dir` and one database.

Single events over 256 connections, as above; the generator and PostgreSQL have the same cores.
CPU, memory and cores are those of all processes together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks import servers
from benchmarks.loads import database, rows, single
from benchmarks.measure import Bench, Contest, Sample, in_turn, memory_goals

TITLE = "Several processes"
_CONNECTIONS = 256


def measure(bench: Bench) -> Iterator[Contest]:
    counts = {1: "1 process", 2: "2 processes", 4: "4 processes"}
    rivals = {name: partial(served, bench, n, _CONNECTIONS) for n, name in counts.items()}
    goals = memory_goals("one process", counts[1])
    yield in_turn(f"{_CONNECTIONS} connections", rivals, bench, goals)


def served(bench: Bench, processes: int, connections: int) -> Sample:
    """Single events to so many processes; all that was answered is in the table afterwards.

    Raises: RuntimeError: it is not.
    """
    with database(bench.postgres) as url:
        with servers.datapipe(url, processes) as server:
            sample, answered = single(server, connections, bench.seconds)
        if (stored := rows(bench.postgres, url)) < answered:
            raise RuntimeError(f"{answered} events answered with 200, {stored} in the table")
    return sample
