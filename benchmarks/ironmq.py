"""IronMQ as the durable queue: a stand-in in a process of its own that answers each call in 50 ms.

Single events: while a call is under way events gather for the next, so the rate grows with the
number of connections. *Share* is the rate as a share of connections / latency, which is what one
would get if each POST waited for exactly one call. Batches: 1,000 events of the README's size per
POST over 64 connections, until committed and deleted from the queue; requests are of all kinds, per
million events. The hour (an event per second, `mirror_linger_ms` at 5,000) and the idle day (of
three event types) are counted on a simulated clock.
"""

from __future__ import annotations

import json
import random
import signal
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec

from benchmarks import ironmq_simulated, servers
from benchmarks.generator import wrk
from benchmarks.ironmq_simulated import DAY_GOAL, HOUR_GOAL, LANES
from benchmarks.loads import batches, database, figures, rows
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals

TITLE = "IronMQ"
LATENCY_S = 0.05
_EVENTS, _CONNECTIONS = 1000, 64
_SINGLES = (64, 256, 1000)  # connections
_REQUESTS = "requests_per_million"
_LETTERS = string.ascii_lowercase + "_"


def measure(bench: Bench) -> Iterator[Contest]:
    rivals = {_named(count): partial(_single, bench, count) for count in _SINGLES}
    yield in_turn("single events", rivals, bench, single_goals())
    name = "1,000 events a POST"
    goals = [
        Goal("IronMQ, requests a million events", name, figure=_REQUESTS, most=600),
        *memory_goals("IronMQ", name),
    ]
    yield in_turn("batches", {name: partial(_batches, bench)}, bench, goals)
    yield _simulated()


def single_goals() -> list[Goal]:
    few, *_, many = rivals = [_named(count) for count in _SINGLES]
    return [
        Goal("IronMQ, 64 connections, share", few, figure="share", least=0.9),
        Goal("IronMQ, 1,000 connections / 64", many, few, least=6),
        *memory_goals("IronMQ", *rivals),
    ]


def _named(connections: int) -> str:
    return f"{connections:,} connections"


def _simulated() -> Contest:
    hour, day = "an event a second for an hour", "idle for a day, per event type"
    requests = {
        hour: [{"requests": float(ironmq_simulated.hour().total())}],
        day: [{"requests": ironmq_simulated.day().total() / LANES}],
    }
    goals = [
        Goal(f"IronMQ, requests, {hour}", hour, figure="requests", most=HOUR_GOAL),
        Goal(f"IronMQ, requests, {day}", day, figure="requests", most=DAY_GOAL),
    ]
    return Contest("simulated", requests, goals, [])


def _events(count: int, seed: int) -> list[dict[str, Any]]:
    """Of the size of the README's example, with random values."""
    values = random.Random(seed)
    return [
        {
            "event_name": "crash_report",
            "user_id": values.randrange(100, 1000),
            "timestamp": values.randrange(1000, 10_000),
            "message": "".join(values.choices(_LETTERS, k=8)),
        }
        for _ in range(count)
    ]


def _single(bench: Bench, connections: int) -> Sample:
    bodies = [msgspec.json.encode(event) for event in _events(1000, 1)]
    with (
        database(bench.postgres) as url,
        _queue() as queue,
        servers.datapipe(url, **queue.settings) as server,
    ):
        wrk(server.url, bodies, connections, 2)
        before, cpu_s = queue.report()["total"], server.cpu_s()
        load = wrk(server.url, bodies, connections, bench.seconds)
        after, cpu_s = queue.report()["total"], server.cpu_s() - cpu_s
        sample = figures(server, load, load.requests, load.seconds, cpu_s)
    return sample | {
        "share": sample["rate"] * LATENCY_S / connections,
        _REQUESTS: (after - before) / load.requests * 1e6,
    }


def _batches(bench: Bench) -> Sample:
    bodies = [msgspec.json.encode(_events(_EVENTS, seed)) for seed in range(100)]
    with (
        database(bench.postgres) as url,
        _queue() as queue,
        servers.datapipe(url, **queue.settings) as server,
    ):

        def settle() -> None:
            server.load()
            while queue.waiting():  # what was on its way when the sending ended
                time.sleep(0.1)
                server.load()

        sample = batches(
            server, bodies, _EVENTS, bench.seconds, settle=settle, connections=_CONNECTIONS,
            count=partial(rows, bench.postgres, url),
        )  # fmt: skip
        requests = queue.report()["total"] / rows(bench.postgres, url) * 1e6
    return sample | {_REQUESTS: requests}


class _Queue:
    """The stand-in for IronMQ, in a process of its own."""

    def __init__(self, told: dict[str, str]) -> None:
        self._url = f"{told['url']}/_control"
        self.settings: dict[str, Any] = {
            "mirror": "ironmq",
            "ironmq_host": told["url"],
            "ironmq_token": told["token"],
            "ironmq_project_id": told["project_id"],
        }

    def report(self) -> dict[str, Any]:
        with urllib.request.urlopen(self._url, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def waiting(self) -> int:
        """Messages that are not deleted yet."""
        return sum(self.report()["queues"].values())


@contextmanager
def _queue() -> Iterator[_Queue]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.doubles.ironmq", "--latency", str(LATENCY_S)],
        cwd=servers.ROOT, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield _Queue(json.loads(process.stdout.readline()))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
