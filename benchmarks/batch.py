"""batch: 1,000 events a POST until the last row is committed, beside `copy_expert` of the rows.

A third rival is the bare aiohttp application under the same POSTs: the generator's own limit.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import psycopg2

from benchmarks import servers
from benchmarks.events import COLUMNS, NAMES, TABLE, as_array, as_rows, crashes
from benchmarks.generator import post_all
from benchmarks.measure import Contest, Sample, in_turn
from tests.postgres import Postgres

POSTS = 2000
EVENTS = 1000  # of one POST
CONNECTIONS = 8
GOAL = 0.4
_DISTINCT = 100  # bodies, sent in turn
_COPY_BYTES = 524_288  # of one COPY write, as datapipe's


class Batch:
    """The rivals; all send the same events."""

    def __init__(self, postgres: Postgres) -> None:
        batches = [crashes(EVENTS, seed) for seed in range(_DISTINCT)]
        self._bodies = [as_array(batch) for batch in batches] * (POSTS // _DISTINCT)
        self._rows = b"".join(as_rows(batch) for batch in batches) * (POSTS // _DISTINCT)
        self._postgres = postgres

    def datapipe(self) -> Sample:
        """From the first POST until `POST /load` has committed the last row."""
        url = self._fresh_database()
        with servers.datapipe(url) as server:
            post_all(server.url, self._bodies[:10], CONNECTIONS)  # tables, code, connections
            server.load()
            cpu_s, started = server.cpu_s(), time.perf_counter()
            load = post_all(server.url, self._bodies, CONNECTIONS)
            server.load()
            seconds = time.perf_counter() - started
            self._count(url, (POSTS + 10) * EVENTS)
            cpu_s, peak_mb = server.cpu_s() - cpu_s, server.memory_mb("VmHWM")
        self._drop(url)
        events = POSTS * EVENTS
        return Sample(
            events / seconds, load.p50_ms, load.p99_ms, cpu_s / events * 1e6, peak_mb,
            cpu_s / seconds, load.cpu_s / load.seconds,
        )  # fmt: skip

    def copy(self) -> Sample:
        """One COPY of all rows from memory, one transaction."""
        url = self._fresh_database()
        connection = psycopg2.connect(url)
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE TABLE {TABLE} ({COLUMNS})")
            connection.commit()
            cpu_s, started = time.process_time(), time.perf_counter()
            statement = f"COPY {TABLE} ({NAMES}) FROM STDIN"
            cursor.copy_expert(statement, io.BytesIO(self._rows), _COPY_BYTES)
            connection.commit()
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
        connection.close()
        self._count(url, POSTS * EVENTS)
        self._drop(url)
        events = POSTS * EVENTS
        return Sample(events / seconds, cpu_s_per_million=cpu_s / events * 1e6)

    def bare(self) -> Sample:
        """The same POSTs, read and answered with a constant."""
        with servers.bare() as server:
            post_all(server.url, self._bodies[:10], CONNECTIONS)
            cpu_s = server.cpu_s()
            load = post_all(server.url, self._bodies, CONNECTIONS)
            cpu_s = server.cpu_s() - cpu_s
        events = POSTS * EVENTS
        return Sample(
            events / load.seconds, load.p50_ms, load.p99_ms, cpu_s / events * 1e6,
            server_cores=cpu_s / load.seconds, generator_cores=load.cpu_s / load.seconds,
        )  # fmt: skip

    def _fresh_database(self) -> str:
        """Empty, and with no checkpoint left over from the run before."""
        url = self._postgres.create_database()
        self._postgres.execute(url, "CHECKPOINT")
        return url

    def _drop(self, url: str) -> None:
        name = url.rpartition("/")[2]
        self._postgres.execute(self._postgres.url("postgres"), f"DROP DATABASE {name}")

    def _count(self, url: str, wanted: int) -> None:
        ((rows,),) = self._postgres.execute(url, f"SELECT count(*) FROM {TABLE}")
        if rows != wanted:
            raise RuntimeError(f"{wanted} events were sent, {rows} are in the table")


def contests(postgres: Postgres, runs: int, say: Callable[[str], None]) -> list[Contest]:
    batch = Batch(postgres)
    rivals = {
        "datapipe": batch.datapipe,
        "copy_expert": batch.copy,
        "bare aiohttp": batch.bare,
    }
    name = f"batch, {EVENTS} events a POST"
    return [in_turn(name, rivals, runs, {"copy_expert": GOAL}, say)]
