"""Many events per POST over 8 connections, from the first POST until the last row is committed.

datapipe ends with `POST /load`, which answers when everything is in its table. *copy_expert* is one
COPY of the same rows, ready in memory, in one transaction: the most that PostgreSQL takes from one
connection. *Bare aiohttp* and *the generator's limit* read the same bodies and store nothing. The
peers get the same batches and write one statement for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import psycopg2

from benchmarks import servers
from benchmarks.copying import COPY_BYTES
from benchmarks.events import (
    COLUMNS,
    NAMES,
    TABLE,
    as_array,
    as_ndjson,
    as_rows,
    batches,
    packed,
)
from benchmarks.loads import batches as send
from benchmarks.loads import database, opened, rows
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn, memory_goals
from benchmarks.peers import PEERS, Peer
from benchmarks.single import BARE, LIMIT
from tests.postgres import Postgres

TITLE = "Batches"
COPY = "copy_expert"
_OURS = "datapipe"
_EVENTS = 1000
_PEERS = [peer for peer in PEERS if peer.takes_batches and peer.durable]
_COPIED = 2_000_000  # rows of copy_expert


def goals() -> list[Goal]:
    made = [
        Goal("batches of 1,000 until committed / copy_expert", _OURS, COPY, least=0.7),
        Goal("batches of 1,000, events/s", _OURS, least=1_200_000),
    ]
    made += [Goal(f"batches of 1,000 / {peer.name}", _OURS, peer.name, least=3) for peer in _PEERS]
    return made + memory_goals("batches", _OURS)


def measure(bench: Bench) -> Iterator[Contest]:
    name = "1,000 events a POST, as a JSON array"
    yield in_turn(name, _rivals(bench), bench, goals(), undrawn=[BARE, LIMIT])
    forms = _forms(bench)
    yield in_turn("datapipe's batches by form", forms, bench, memory_goals("batches", *forms))


def _rivals(bench: Bench) -> dict[str, Callable[[], Sample]]:
    bodies = [as_array(batch) for batch in batches(_EVENTS)]

    def bare(server: servers.Server) -> Sample:
        return send(server, bodies, _EVENTS, bench.seconds, settle=lambda: None, count=None)

    def plain() -> Sample:
        with servers.bare() as server:
            return bare(server)

    def limit() -> Sample:
        with servers.sink() as server:
            return bare(server)

    return {
        _OURS: partial(_datapipe, bench, bodies, _EVENTS),
        COPY: partial(copy, bench.postgres, _COPIED),
        BARE: plain,
        LIMIT: limit,
        **{peer.name: partial(_peer, peer, bench, bodies) for peer in _PEERS},
    }


def _forms(bench: Bench) -> dict[str, Callable[[], Sample]]:
    rivals: dict[str, Callable[[], Sample]] = {}
    for events in (1000, 100):
        for form, made in (("array", as_array), ("NDJSON", as_ndjson)):
            plain = [made(batch) for batch in batches(events)]
            for encoding, bodies in (("", plain), ("gzip", [packed(body) for body in plain])):
                name = f"{events:,} a POST, {form}{', gzip' if encoding else ''}"
                rivals[name] = partial(_datapipe, bench, bodies, events, encoding)
    return rivals


def _datapipe(bench: Bench, bodies: list[bytes], events: int, encoding: str = "") -> Sample:
    with database(bench.postgres) as url, servers.datapipe(url) as server:
        return send(
            server, bodies, events, bench.seconds, settle=server.load,
            count=lambda: rows(bench.postgres, url), encoding=encoding,
        )  # fmt: skip


def _peer(peer: Peer, bench: Bench, bodies: list[bytes]) -> Sample:
    with opened(peer, bench.postgres) as (server, count):
        settle = partial(peer.settle, server)
        return send(server, bodies, _EVENTS, bench.seconds, settle=settle, count=count)


class _Rows:
    """A file of COPY rows: the same block over and over."""

    def __init__(self, block: bytes, times: int) -> None:
        self._block = block
        self._left = times
        self._at = 0

    def read(self, size: int) -> bytes:
        if self._at == len(self._block):
            self._at, self._left = 0, self._left - 1
        if self._left <= 0:
            return b""
        part = self._block[self._at : self._at + size]
        self._at += len(part)
        return part


def copy(postgres: Postgres, count: int) -> Sample:
    """One COPY of at least so many rows, one transaction."""
    block_rows = 100 * _EVENTS
    block = b"".join(as_rows(batch) for batch in batches(_EVENTS))
    times = -(-count // block_rows)
    with database(postgres) as url:
        connection = psycopg2.connect(url)
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE TABLE {TABLE} ({COLUMNS})")
                connection.commit()
                cpu_s, started = time.process_time(), time.perf_counter()
                statement = f"COPY {TABLE} ({NAMES}) FROM STDIN"
                cursor.copy_expert(statement, _Rows(block, times), COPY_BYTES)
                connection.commit()
                seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
        finally:
            connection.close()
        if rows(postgres, url) != times * block_rows:
            raise RuntimeError("COPY has not written all rows")
    events = times * block_rows
    return {"rate": events / seconds, "cpu_s_per_million": cpu_s / events * 1e6}
