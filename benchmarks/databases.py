"""The databases that datapipe can load into, beside each other and beside their own fastest load.

*A load alone*: datapipe's load of 180,000 rows, stored as 180 times 1,000, with its ledger rows, in
the benchmark's own process, without HTTP. Beside it the same rows, ready in memory, in one
transaction, into a table that datapipe made: COPY from psycopg2, LOAD DATA LOCAL from PyMySQL,
`executemany` of tuples. There are three times as many turns, each a third as long. A rate is the
median of a run's loads. The CPU is that of the process that loads, in which SQLite does all of its
work, while the others have servers of their own. *Batches* are those of [Batches](#batches).

*The event loop's delay*: 2,000 POSTs per second over 64 connections, every twentieth with 1,000
events, so that there is always something to load. While a load runs, a coroutine of the service
sleeps for a millisecond over and over, and notes how much later it wakes; a timer alone is up to a
millisecond late. *Inside* is of all POSTs: from when the bytes have arrived until the answer is
written.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

from benchmarks import servers, stores
from benchmarks.events import TABLE, Crash, as_array, as_json, as_rows, batches, crashes
from benchmarks.generator import paced, wrk
from benchmarks.loads import WARM_UP_S
from benchmarks.loads import batches as send
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals
from benchmarks.steady import REQUESTS, taken
from benchmarks.stores import STORES, Store
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Table, open_sink

TITLE = "Databases"
_OURS = "datapipe"
_LEAST = {"MariaDB": 0.9, "SQLite": 0.65}  # of its own fastest load
_LATE_MS = 15
_LATE_S = 10  # at least, or too few loads fall into it
_EVENTS = 1000  # of a batch, and of a segment
_SEGMENTS = 180  # of a load
_TURNS = 3  # of loads alone in place of one, each so much shorter: the ratio is what counts
_ROWS = _SEGMENTS * _EVENTS
WATCHER, LOGGED = "benchmarks.lateness", "event loop delays"  # importing it changes the sinks
_RATE, _CONNECTIONS = 2000, 64
_MIXED = [  # 20 batches, and 19 single events behind each
    body
    for i, batch in enumerate(batches(_EVENTS, 20))
    for body in [as_array(batch), *map(as_json, crashes(19, 1000 + i))]
]
_MIXED_EVENTS = (_EVENTS + 19) / 20  # of one of them, on average
_TABLE = Table(
    TABLE,
    (
        Column("user_id", "bigint"),
        Column("timestamp", "bigint"),
        Column("message", "text"),
        Column("received_at", "timestamptz"),
    ),
)


def load_goals(store: type[Store]) -> list[Goal]:
    if store.name not in _LEAST:
        return []
    what = f"a load alone, {store.name} / {store.fastest}"
    return [Goal(what, _OURS, store.fastest, least=_LEAST[store.name])]


def batch_goals() -> list[Goal]:
    return memory_goals("batches into each database", *(store.name for store in STORES))


def delay_goals() -> list[Goal]:
    return [
        Goal(f"p99 ms of the event loop's delay while loads run, {store.name}", store.name,
             figure="late_p99_ms", most=_LATE_MS)
        for store in STORES
    ]  # fmt: skip


def measure(bench: Bench) -> Iterator[Contest]:
    with stores.opened(bench.postgres) as there:
        often = replace(bench, runs=_TURNS * bench.runs, seconds=bench.seconds / _TURNS)
        loaded = batches(_EVENTS, _SEGMENTS)
        for store in there:
            rivals = {
                _OURS: partial(_alone, store, loaded, often.seconds),
                store.fastest: partial(_bare, store, loaded, often.seconds),
            }
            name = f"a load alone, {store.name} {store.version}"
            yield in_turn(name, rivals, often, load_goals(type(store)))
        bodies = [as_array(batch) for batch in batches(_EVENTS)]
        runs = {each.name: partial(_batches, each, bodies, bench.seconds) for each in there}
        yield in_turn("batches of 1,000 until committed", runs, bench, batch_goals())
        runs = {each.name: partial(_late, each, max(_LATE_S, 2 * bench.seconds)) for each in there}
        drawn = ["late_p99_ms"]
        yield in_turn("the event loop's delay while loads run", runs, bench, delay_goals(), drawn)


# --- loads alone ---


class Loads:
    """How long loads took and what CPU they cost; the first one is not counted."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._took: list[float] = []
        self._cpu_s: list[float] = []  # ours
        self._server_s: list[float] = []

    def enough(self) -> bool:
        """Whether they took as many seconds in all as a run should."""
        return len(self._took) > 1 and sum(self._took[1:]) >= self._seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        server_s = self._store.cpu_s()
        cpu_s, started = time.process_time(), time.perf_counter()
        yield
        self._took.append(time.perf_counter() - started)
        self._cpu_s.append(time.process_time() - cpu_s)
        self._server_s.append(self._store.cpu_s() - server_s)

    def sample(self, url: str) -> Sample:
        """Raises: RuntimeError: not all rows are in the table."""
        wanted = len(self._took) * _ROWS
        if (stored := self._store.rows(url)) != wanted:
            raise RuntimeError(f"{wanted} rows were loaded, {stored} are in the table")
        sample = {
            "rate": _ROWS / statistics.median(self._took[1:]),
            "cpu_s_per_million": statistics.mean(self._cpu_s[1:]) / _ROWS * 1e6,
            "loads": len(self._took) - 1,
        }
        if any(self._server_s):  # SQLite has no server
            sample["database_s_per_million"] = statistics.mean(self._server_s[1:]) / _ROWS * 1e6
        return sample


def _alone(store: Store, loaded: Sequence[Sequence[Crash]], seconds: float) -> Sample:
    loads = Loads(store, seconds)
    blocks = [as_rows(batch) for batch in loaded]

    async def run(url: str) -> None:
        async with open_sink(Settings(database_url=url), "benchmark") as sink:
            while not loads.enough():
                segments = [
                    Segment(TABLE, _TABLE.columns, block, _EVENTS, neutral=True) for block in blocks
                ]
                with loads.timed():
                    await sink.load(_TABLE, segments)

    with store.database() as url:
        asyncio.run(run(url))
        return loads.sample(url)


def _bare(store: Store, loaded: Sequence[Sequence[Crash]], seconds: float) -> Sample:
    loads = Loads(store, seconds)
    rows = list(chain.from_iterable(loaded))

    async def prepare(url: str) -> None:
        async with open_sink(Settings(database_url=url), "benchmark") as sink:
            await sink.prepare(_TABLE)

    with store.database() as url:
        asyncio.run(prepare(url))
        with store.bare(url, rows) as load:
            while not loads.enough():
                with loads.timed():
                    load()
        return loads.sample(url)


# --- through the service ---


def _batches(store: Store, bodies: Sequence[bytes], seconds: float) -> Sample:
    with store.database() as url, servers.datapipe(url) as server:
        return send(
            server, bodies, _EVENTS, seconds, settle=server.load, count=partial(store.rows, url)
        )


def _late(store: Store, seconds: float) -> Sample:
    """Raises: RuntimeError: no load fell into the run."""
    with store.database() as url, servers.datapipe(url, event_modules=[WATCHER]) as server:
        wrk(server.url, _MIXED, _CONNECTIONS, WARM_UP_S)
        server.load()
        before, loads = server.buckets(REQUESTS), len(server.logged(LOGGED))
        load = paced(server.url, _MIXED, _CONNECTIONS, _RATE, seconds)
        late_ms = [each["late_ms"] for each in server.logged(LOGGED)[loads:]]
        inside = taken(server.buckets(REQUESTS), before)
    noted = sorted(chain.from_iterable(late_ms))
    if not noted:
        raise RuntimeError(f"no load within {seconds:.0f} s")
    return {
        "rate": load.rate * _MIXED_EVENTS,
        **inside,
        "late_p50_ms": noted[len(noted) // 2],
        "late_p99_ms": noted[len(noted) * 99 // 100],
        "late_max_ms": noted[-1],
        "loads": len(late_ms),
    }
