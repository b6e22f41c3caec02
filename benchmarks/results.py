"""What was measured, kept as JSON: a file for each part, written after each of its contests."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Bench, Contest
from datapipe.version import __version__
from tests.postgres import Postgres


@dataclass(slots=True)
class Result:
    """A part as measured. `machine` and `how` are sentences for the page."""

    machine: str
    how: str
    contests: list[Contest]


def machine(postgres: Postgres) -> str:
    """Where the figures come from."""
    cpu = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0 0")
    names = ("server_version", "shared_buffers", "fsync")
    shown = [postgres.execute(postgres.url("postgres"), f"SHOW {name}")[0][0] for name in names]
    version, buffers, fsync = shown
    return (
        f"{len(os.sched_getaffinity(0))} cores ({_model(cpu)}), "
        f"{int(memory.split()[1]) / 1024**2:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, PostgreSQL {version} on the same machine "
        f"(shared_buffers {buffers}, fsync {fsync}), generator: wrk on the same machine"
    )


def how(bench: Bench) -> str:
    load = os.getloadavg()[0]
    runs = "1 run" if bench.runs == 1 else f"{bench.runs} runs of each rival, in turn"
    return (
        f"datapipe {__version__}, {time.strftime('%Y-%m-%d')}: {runs}, {bench.seconds:g} s each "
        f"unless said otherwise; load average before: {load:.2f}"
    )


def _model(lines: Sequence[str]) -> str:
    return lines[0].partition(":")[2].strip() if lines else platform.machine()


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def save(folder: Path, part: str, result: Result) -> None:
    value = {
        "machine": result.machine,
        "how": result.how,
        "contests": [contest.as_json() for contest in result.contests],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps(value, indent=1) + "\n")


def read(folder: Path, part: str) -> Result | None:
    """What was saved of a part; None if nothing was."""
    file = folder / f"{part}.json"
    if not file.exists():
        return None
    value = json.loads(file.read_text())
    contests = [Contest.from_json(contest) for contest in value["contests"]]
    return Result(value["machine"], value["how"], contests)
