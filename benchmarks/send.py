"""`datapipe send` of a million events from a gzipped NDJSON file, on the machine of the service.

Timed from the start of the command until the last row is committed, beside the same number of
events in batches of 1,000 from wrk, without keys. The file is read, unpacked, cut and hashed on the
cores that the service and PostgreSQL use. *Again* is the second time, to a service that has them
all: every event is a duplicate, and no row is added.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import servers
from benchmarks.events import as_array, as_ndjson, batches
from benchmarks.generator import Load, wrk
from benchmarks.loads import BATCH_CONNECTIONS, database, figures, rows, warm_up
from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn

TITLE = "Files"
_EVENTS = 1_000_000
_QUICK_EVENTS = 100_000
_BATCH = 1000
_SEND, _AGAIN, _WRK = "datapipe send", "datapipe send, again", "wrk, batches of 1,000"


def goals() -> list[Goal]:
    return [
        Goal("a file by `datapipe send` / wrk's batches", _SEND, _WRK, least=0.7),
        Goal("the same file again / the first time", _AGAIN, _SEND, least=1 / 1.2),
    ]


def measure(bench: Bench) -> Iterator[Contest]:
    events = _QUICK_EVENTS if bench.seconds <= 1 else _EVENTS
    with servers.work_folder() as folder:
        file = folder / "events.ndjson.gz"
        with gzip.open(file, "wb", compresslevel=6) as packed:
            for batch in batches(_BATCH, events // _BATCH):
                packed.write(as_ndjson(batch))
        again: list[Sample] = []
        rivals = {
            _SEND: partial(_send, bench, file, events, again),
            _AGAIN: again.pop,
            _WRK: partial(_wrk, bench, events),
        }
        yield in_turn(f"{events:,} events", rivals, bench, goals())


def _send(bench: Bench, file: Path, events: int, again: list[Sample]) -> Sample:
    """The first time; what the second gives is put into `again`.

    Raises: RuntimeError: the table does not hold each event once.
    """
    with database(bench.postgres) as url, servers.datapipe(url) as server:
        _warm_up(server)
        before = rows(bench.postgres, url)
        file.with_name(f"{file.name}.datapipe-sent").unlink(missing_ok=True)
        first = _timed(server, file, events)
        again.append(_timed(server, file, events, "--again"))
        if (stored := rows(bench.postgres, url) - before) != events:
            raise RuntimeError(f"{events} events were sent twice, {stored} are in the table")
    return first


def _warm_up(server: servers.Server) -> None:
    warm_up(server.url, [as_array(batch) for batch in batches(_BATCH)])
    server.load()


def _timed(server: servers.Server, file: Path, events: int, *options: str) -> Sample:
    cpu_s, before, began = server.cpu_s(), os.times(), time.perf_counter()
    command = [sys.executable, "-m", "datapipe", "send", str(file), "--url", server.url, *options]
    subprocess.run(command, cwd=servers.ROOT, check=True, capture_output=True, timeout=300)
    sent = time.perf_counter() - began
    server.load()
    took, after = time.perf_counter() - began, os.times()
    sender_s = after.children_user + after.children_system
    sender_s -= before.children_user + before.children_system
    load = Load(events // _BATCH, sent, sender_s, 0, 0)
    return figures(server, load, events, took, server.cpu_s() - cpu_s)


def _wrk(bench: Bench, events: int) -> Sample:
    """As many as wrk sends in the time that they take, in whole seconds."""
    bodies = [as_array(batch) for batch in batches(_BATCH)]
    with database(bench.postgres) as url, servers.datapipe(url) as server:
        _warm_up(server)
        cpu_s, before = server.cpu_s(), rows(bench.postgres, url)
        load = wrk(server.url, bodies, BATCH_CONNECTIONS, 2 if events > _QUICK_EVENTS else 1)
        began = time.perf_counter()
        server.load()
        took = load.seconds + time.perf_counter() - began
        stored = rows(bench.postgres, url) - before
        return figures(server, load, stored, took, server.cpu_s() - cpu_s)
