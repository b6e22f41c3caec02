"""How datapipe behaves when many events wait, and with many event types or wide tables.

*Waiting*: the database can't be reached, and the journal's limit is raised. For each level the
journal is filled, the process is killed and started again (the journal is still in the page cache),
and the time is taken until `/readyz` is 200 and until all that waits is counted. Then batches of
1,000 come over 8 connections for a second or two: what an event costs on top of those that wait.
*Event types* and *columns*: batches of 1,000 until committed, the events spread over the types;
every other column is `int`, the others `str`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import servers
from benchmarks.events import as_array, batches
from benchmarks.generator import wrk
from benchmarks.loads import BATCH_CONNECTIONS, database, figures, warm_up
from benchmarks.loads import batches as send
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals
from benchmarks.servers import Server
from tests.ports import free_port

TITLE = "Growth"
JOURNAL_BYTES = 8 << 30
_EVENTS = 1000
_CPU = "cpu_s_per_million"
_NONE, _TEN = "0 waiting", "10 million waiting"
_LEVELS = {_NONE: 0, "1 million waiting": 1_000_000, _TEN: 10_000_000}


def measure(bench: Bench) -> Iterator[Contest]:
    waiting = _Waiting(bench)
    try:
        yield in_turn(
            "batches of 1,000, by events waiting",
            {name: partial(waiting.at, name) for name in _LEVELS},
            bench,
            [
                Goal("CPU an event, 10 million / 0 waiting", _TEN, _NONE, _CPU, most=1.1),
                Goal("seconds to ready, 10 million waiting", _TEN, figure="ready_s", most=2),
                *memory_goals("growth", *_LEVELS),
            ],
            [_CPU, "ready_s", "peak_mb"],
        )
    finally:
        waiting.close()
    types = {_count(n, "event type"): partial(_declared, bench, n, 3) for n in (1, 10, 100)}
    yield in_turn("by event types", types, bench, memory_goals("growth", *types), [_CPU])
    columns = {_count(n, "column"): partial(_declared, bench, 1, n) for n in (3, 10, 50)}
    yield in_turn("by columns", columns, bench, memory_goals("growth", *columns), [_CPU])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- much waits ---


class _Waiting:
    """A journal that grows from level to level, and begins anew at the first."""

    def __init__(self, bench: Bench) -> None:
        self._seconds = min(2, bench.seconds)
        self._bodies = [as_array(batch) for batch in batches(_EVENTS)]
        self._url = f"postgresql://postgres@127.0.0.1:{free_port()}/nobody_listens"
        self._stack = ExitStack()
        self._folder = Path()

    def close(self) -> None:
        self._stack.close()

    def at(self, level: str) -> Sample:
        waiting, peak_mb = 0, 0.0
        if level == _NONE:
            self._stack.close()
            self._folder = self._stack.enter_context(servers.work_folder())
        else:
            with self._service() as server:
                waiting = fill(server, self._bodies, _LEVELS[level])
                peak_mb = server.memory_mb("VmHWM")
                os.kill(server.pid, signal.SIGKILL)
        started = time.perf_counter()
        with self._service() as server:
            sample = _starting(server, waiting, started)
            warm_up(server.url, self._bodies[:20])
            cpu_s = server.cpu_s()
            load = wrk(server.url, self._bodies, BATCH_CONNECTIONS, self._seconds)
            cpu_s = server.cpu_s() - cpu_s
            sample |= figures(server, load, load.requests * _EVENTS, load.seconds, cpu_s)
        return sample | {"peak_mb": max(peak_mb, sample["peak_mb"])}

    def _service(self) -> AbstractContextManager[Server]:
        more: dict[str, Any] = {"journal_max_bytes": JOURNAL_BYTES, "shutdown_timeout": 0}
        return servers.datapipe_in(self._folder, self._url, **more)


def fill(server: Server, bodies: Sequence[bytes], events: int) -> int:
    """Send batches of 1,000 until at least so many events wait; how many do."""
    rate = 0.0
    while (waiting := server.books()["waiting"]) < events:
        seconds = (events - waiting) / rate if rate else 1
        load = wrk(server.url, bodies, BATCH_CONNECTIONS, max(1, int(seconds)))
        rate = load.rate * _EVENTS
    return waiting


def _starting(server: Server, waiting: int, started: float) -> Sample:
    """Seconds since a perf_counter until it takes events, and until its books are complete."""
    while not server.is_ready():
        time.sleep(0.01)
    ready_s = time.perf_counter() - started
    while server.books()["waiting"] < waiting:
        time.sleep(0.01)
    return {"ready_s": ready_s, "recovered_s": time.perf_counter() - started}


# --- lanes and columns ---


def _declared(bench: Bench, lanes: int, columns: int) -> Sample:
    """Event types that are declared in the settings."""
    names = [f"lane_{number:03}" for number in range(lanes)]
    fields = {f"c{n:02}": "str" if n % 2 else "int" for n in range(columns)}
    bodies = [_body(names, fields, seed) for seed in range(20)]
    with (
        database(bench.postgres) as url,
        servers.datapipe(url, events=dict.fromkeys(names, fields)) as server,
    ):
        return send(
            server, bodies, _EVENTS, bench.seconds, settle=server.load,
            count=lambda: server.books()["loaded"],
        )  # fmt: skip


def _body(names: Sequence[str], fields: dict[str, str], seed: int) -> bytes:
    """A batch: random values, of some 9 characters each."""
    values = random.Random(seed)
    return msgspec.json.encode(
        [
            {"event_name": names[number % len(names)]}
            | {
                name: values.randrange(10**9) if kind == "int" else f"{values.getrandbits(36):09x}"
                for name, kind in fields.items()
            }
            for number in range(_EVENTS)
        ]
    )
