"""The database is stopped, 10 million events come in, the database is started again.

Timed from when PostgreSQL answers until nothing waits: datapipe notices by itself. *copy_expert*
writes as many rows in one COPY, one transaction. The events came in batches of 1,000; the journal's
limit is raised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import servers
from benchmarks.batch import COPY, copy
from benchmarks.events import as_array, batches
from benchmarks.growth import JOURNAL_BYTES, fill
from benchmarks.loads import database, rows
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals

TITLE = "After an outage"
EVENTS = 10_000_000
_OURS = "datapipe"


def measure(bench: Bench) -> Iterator[Contest]:
    goals = [
        Goal("10 million events after an outage / copy_expert", _OURS, COPY, least=0.6),
        *memory_goals("outage", _OURS),
    ]
    rivals = {_OURS: lambda: _drained(bench), COPY: lambda: copy(bench.postgres, EVENTS)}
    yield in_turn(f"{EVENTS:,} waiting events", rivals, bench, goals)


def _drained(bench: Bench) -> Sample:
    bodies = [as_array(batch) for batch in batches(1000)]
    with database(bench.postgres) as url:
        bench.postgres.stop()
        with servers.datapipe(url, journal_max_bytes=JOURNAL_BYTES) as server:
            try:
                fill(server, bodies, EVENTS)
                time.sleep(1)  # what was on its way when the sending ended
                waiting = server.books()["waiting"]
            finally:
                bench.postgres.start()
            cpu_s, started = server.cpu_s(), time.perf_counter()
            first_s = 0.0
            while (left := server.books()["waiting"]) > 0:
                if left < waiting and not first_s:
                    first_s = time.perf_counter() - started
                time.sleep(0.05)
            seconds, cpu_s = time.perf_counter() - started, server.cpu_s() - cpu_s
            peak_mb = server.memory_mb("VmHWM")
        if (stored := rows(bench.postgres, url)) != waiting:
            raise RuntimeError(f"{waiting} events waited, {stored} are in the table")
    return {
        "rate": waiting / seconds,
        "first_s": first_s,
        "drain_s": seconds,
        "cpu_s_per_million": cpu_s / waiting * 1e6,
        "peak_mb": peak_mb,
        "server_cores": cpu_s / seconds,
    }
