"""python -m benchmarks: measure, print, and write docs/benchmarks.md and its pictures.

What was measured is kept in var/bench, a file for each part: a part that is measured alone replaces
its own section of the page, and --render writes the page again without measuring.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

from benchmarks import (
    batch,
    databases,
    growth,
    ironmq,
    keys,
    memory,
    nats,
    outage,
    page,
    peers,
    processes,
    refused,
    results,
    send,
    single,
    steady,
)
from benchmarks.measure import Bench
from benchmarks.servers import ROOT, WORK
from tests.postgres import Postgres

PARTS: dict[str, ModuleType] = {
    "single": single,
    "keys": keys,
    "batch": batch,
    "send": send,
    "steady": steady,
    "growth": growth,
    "outage": outage,
    "ironmq": ironmq,
    "processes": processes,
    "nats": nats,
    "databases": databases,
    "refused": refused,
    "memory": memory,
}


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are ended on the way out
    quick = WORK / "quick"
    kept, file = (quick, quick / "benchmarks.md") if args.quick else (
        WORK, ROOT / "docs" / "benchmarks.md",
    )  # fmt: skip
    failed: list[str] = []
    if not args.render:
        for line in peers.installed():
            _say(f"missing, so its peer is left out: {line}")
        postgres = Postgres(fsync="on")
        try:
            postgres.start()
            bench = Bench(postgres, args.runs, args.seconds, 60, _say)
            if args.quick:
                bench = Bench(postgres, 1, 1, 5, _say)
            failed = [part for part in args.only or PARTS if not _measure(part, bench, kept)]
        finally:
            postgres.remove()
    parts = [page.Part(name, of.TITLE, of.__doc__ or "") for name, of in PARTS.items()]
    found = {name: result for name in PARTS if (result := results.read(kept, name))}
    page.write(file, parts, found)
    _say(f"written: {file}")
    for part in failed:
        _say(f"{part} has failed: what is above of it is not complete")
    return 1 if failed else 0


def _measure(part: str, bench: Bench, folder: Path) -> bool:
    """Measure one part and keep what comes; whether it was all."""
    result = results.Result(results.machine(bench.postgres), results.how(bench), [])
    started = time.monotonic()
    try:
        for contest in PARTS[part].measure(bench):
            result.contests.append(contest)
            results.save(folder, part, result)
    except Exception:  # the other parts are still worth their time
        traceback.print_exc()
        return False
    _say(f"--- {part}: {time.monotonic() - started:.0f} s")
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts, not all")
    parser.add_argument("--runs", type=int, default=5, help="of each rival (default: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="of a single run (default: 5)")
    parser.add_argument(
        "--quick", action="store_true",
        help="one run of a second each, to see that all works; kept in var/bench/quick",
    )  # fmt: skip
    parser.add_argument("--render", action="store_true", help="write the page, measure nothing")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
