"""python -m benchmarks: run, print, and keep the samples in var/bench/latest.json."""

from __future__ import annotations

import argparse
import sys

from benchmarks import batch, idle, ironmq, refused, report, single
from benchmarks.servers import WORK
from tests.postgres import Postgres

PARTS = ("single", "batch", "refused", "ironmq", "idle")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts, not all")
    parser.add_argument("--runs", type=int, default=5, help="of each rival (default: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="of a single run (default: 5)")
    args = parser.parse_args()
    parts = args.only or PARTS
    postgres = Postgres(fsync="on")
    try:
        postgres.start()
        about, contests = report.machine(postgres), []
        if "single" in parts:
            contests += single.contests(postgres, args.runs, args.seconds, _say)
        if "batch" in parts:
            contests += batch.contests(postgres, args.runs, _say)
        if "refused" in parts:
            contests += refused.contests(postgres, args.runs, _say)
        found = ironmq.measure(postgres, args.seconds, _say) if "ironmq" in parts else None
        memory = idle.measure(postgres) if "idle" in parts else None
    finally:
        postgres.remove()
    report.write(WORK / "latest.json", about, contests, memory)
    print(report.text(about, contests, memory))
    if found is not None:
        print("\n".join(ironmq.lines(found)))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
