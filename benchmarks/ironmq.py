"""ironmq: requests to it for a million events; rates with a mirror that answers in 50 ms."""

from __future__ import annotations

import json
import random
import signal
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarks import ironmq_simulated, servers
from benchmarks.generator import post_all, wrk
from tests.postgres import Postgres

LATENCY_S = 0.05
EVENTS, BATCH, CONNECTIONS = 1_000_000, 1_000, 64
REQUESTS_GOAL = 600
SHARE_GOAL = 0.9  # of connections / latency, with 64 connections
GROWTH_GOAL = 6.0  # of 1,000 connections over 64
_LETTERS = string.ascii_lowercase + "_"


@dataclass(slots=True)
class Rate:
    """POSTs of one event a second, and what that cost."""

    connections: int
    rate: float
    p99_ms: float
    requests: int
    peak_connections: int


@dataclass(slots=True)
class Result:
    """Requests to IronMQ for a million events, by kind; rates; the simulated hour and day."""

    seconds: float
    requests: dict[str, int]
    bytes_each: float  # rows of an event, as stored
    rates: list[Rate]
    simulated: list[str]


def measure(postgres: Postgres, seconds: float, say: Callable[[str], None]) -> Result:
    took, requests, size = _million(postgres)
    say(f"ironmq, a million events: {sum(requests.values())} requests")
    rates = []
    for connections in (CONNECTIONS, 1000):
        rates.append(_rate(postgres, connections, seconds))
        say(f"ironmq, {connections} connections: {rates[-1].rate:,.0f}/s")
    return Result(took, requests, size, rates, ironmq_simulated.text())


def lines(result: Result) -> list[str]:
    """What is printed: a figure and its goal a line."""
    total = sum(result.requests.values())
    few, many = result.rates
    share, growth = few.rate / (few.connections / LATENCY_S), many.rate / few.rate
    kinds = ", ".join(f"{kind} {n}" for kind, n in result.requests.items())
    return [
        f"ironmq: a million events in batches of {BATCH:,} over {CONNECTIONS} connections, "
        f"{result.seconds:.0f} s: {total} requests (goal <= {REQUESTS_GOAL}: "
        f"{_verdict(total <= REQUESTS_GOAL)}); {kinds}; {result.bytes_each:.1f} bytes an event",
        *result.simulated,
        *(
            f"ironmq: {each.connections} connections, one event a POST, IronMQ answers in "
            f"{LATENCY_S * 1e3:.0f} ms: {each.rate:,.0f}/s, p99 {each.p99_ms:.0f} ms; at most "
            f"{each.peak_connections} connections to IronMQ, {each.requests} requests"
            for each in result.rates
        ),
        f"ironmq: {few.connections} connections: {share:.2f} of connections / latency (goal >= "
        f"{SHARE_GOAL}: {_verdict(share >= SHARE_GOAL)}); {many.connections} connections: "
        f"{growth:.1f} times that (goal >= {GROWTH_GOAL:g}: {_verdict(growth >= GROWTH_GOAL)})",
    ]


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


# --- a million events ---


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


def _million(postgres: Postgres) -> tuple[float, dict[str, int], float]:
    """Until the last row is committed and the last message deleted: seconds, requests, size."""
    bodies = [msgspec.json.encode(_events(BATCH, seed)) for seed in range(EVENTS // BATCH)]
    database = postgres.create_database()
    with _queue() as queue, servers.datapipe(database, **queue.settings) as server:
        started = time.perf_counter()
        post_all(server.url, bodies, CONNECTIONS)
        server.load()
        queue.wait_until_empty()
        seconds, report = time.perf_counter() - started, queue.report()
        ((rows,),) = postgres.execute(database, "SELECT count(*) FROM crash_report")
        if rows != EVENTS:
            raise RuntimeError(f"{EVENTS} events were sent, {rows} are in the table")
    posts = report["requests"]["post"]
    return seconds, report["requests"], posts * 65_536 / EVENTS


# --- rates ---


def _rate(postgres: Postgres, connections: int, seconds: float) -> Rate:
    bodies = [msgspec.json.encode(event) for event in _events(1000, 1)]
    database = postgres.create_database()
    with _queue() as queue, servers.datapipe(database, **queue.settings) as server:
        wrk(server.url, bodies, connections, 2)
        before = queue.report()["total"]
        load = wrk(server.url, bodies, connections, seconds)
        report = queue.report()
    rate = load.requests / load.seconds
    requests = report["total"] - before
    return Rate(connections, rate, load.p99_ms, requests, report["peak_connections"])


# --- the stand-in ---


class _Queue:
    """The stand-in for IronMQ, in a process of its own."""

    def __init__(self, told: dict[str, str]) -> None:
        self._url = f"{told['url']}/_control"
        self.settings = {
            "mirror": "ironmq",
            "ironmq_host": told["url"],
            "ironmq_token": told["token"],
            "ironmq_project_id": told["project_id"],
        }

    def report(self) -> dict[str, Any]:
        with urllib.request.urlopen(self._url, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def wait_until_empty(self) -> None:
        while sum(self.report()["queues"].values()):
            time.sleep(0.1)


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


if __name__ == "__main__":
    server = Postgres(fsync="on")
    try:
        server.start()
        print("\n".join(lines(measure(server, 5, print))))
    finally:
        server.remove()
