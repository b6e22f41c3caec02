"""python -m benchmarks.peers: a short run of each, and whether all it answered is in the table."""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.events import COLUMNS, TABLE, as_array, as_json, crashes
from benchmarks.generator import wrk
from benchmarks.peers import PEERS, Peer, installed
from tests.postgres import Postgres

EVENTS = 1000  # of a batch
SINGLES = [as_json(crash) for crash in crashes(1000)]
BATCHES = [as_array(crashes(EVENTS, seed)) for seed in range(20)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="peers with this in their name")
    parser.add_argument("--seconds", type=float, default=3, help="of each run (default: 3)")
    args = parser.parse_args()
    if missing := installed():
        print("\n".join(["run tools/bench-needs first:", *missing]), file=sys.stderr)
        return 1
    postgres, right = Postgres(fsync="on"), True
    try:
        postgres.start()
        for peer in PEERS:
            if args.only in peer.name:
                right &= _run(postgres, peer, SINGLES, 1, 64, args.seconds)
                right &= _run(postgres, peer, SINGLES, 1, 256, args.seconds)
                if peer.takes_batches:
                    right &= _run(postgres, peer, BATCHES, EVENTS, 8, args.seconds)
    finally:
        postgres.remove()
    return 0 if right else 1


def _run(
    postgres: Postgres,
    peer: Peer,
    bodies: list[bytes],
    events: int,
    connections: int,
    seconds: float,
) -> bool:
    """One run, its line; false: the table does not hold what was answered."""
    url = postgres.create_database()
    postgres.execute(url, f"CREATE TABLE {TABLE} ({COLUMNS})")
    postgres.execute(url, "CHECKPOINT")
    with peer.open(url) as server:
        warm_up = wrk(server.url, bodies, connections, 1)
        cpu_s, began = server.cpu_s(), time.perf_counter()
        load = wrk(server.url, bodies, connections, seconds)
        cpu_s = server.cpu_s() - cpu_s
        peer.settle(server)
        settled = time.perf_counter() - began
        answered = (warm_up.requests + load.requests) * events
        rows = _standing(postgres, url)
        # what wrk had sent and not yet seen answered at its two ends may be there as well
        right = answered <= rows <= answered + 2 * connections * events
        memory_mb = server.memory_mb("VmHWM")
    print(
        f"{peer.name:45} {connections:3} connections x {events:4}: "
        f"{load.requests * events / load.seconds:9,.0f} events/s, p50 {load.p50_ms:.2f} ms, "
        f"p99 {load.p99_ms:.2f} ms, {cpu_s / load.seconds:.2f} cores, {memory_mb:.0f} MB, settled "
        f"after {settled:.1f} s; {answered:,} answered, {rows:,} rows{'' if right else ': WRONG'}",
        flush=True,
    )
    postgres.execute(postgres.url("postgres"), f"DROP DATABASE {url.rpartition('/')[2]}")
    return right


def _standing(postgres: Postgres, url: str) -> int:
    """How many rows there are once no more come."""
    before = -1
    while True:
        ((rows,),) = postgres.execute(url, f"SELECT count(*) FROM {TABLE}")
        if rows == before:
            return int(rows)
        before = rows
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
