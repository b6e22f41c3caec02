"""The machine, a table, and one clear line a ratio; the same as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.idle import GOAL_MB, Idle
from benchmarks.measure import Contest
from tests.postgres import Postgres

_COLUMNS = {
    "rate": ("events/s", ",.0f"),
    "p50_ms": ("p50 ms", ".2f"),
    "p99_ms": ("p99 ms", ".2f"),
    "cpu_s_per_million": ("CPU s/M", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "server_cores": ("cores", ".2f"),
    "generator_cores": ("gen. cores", ".2f"),
}


def machine(postgres: Postgres) -> dict[str, Any]:
    """Where the figures come from."""
    cpu = [line for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line for line in _read("/proc/meminfo") if line.startswith("MemTotal")), "0 0")
    ((version,),) = postgres.execute(postgres.url("postgres"), "SHOW server_version")
    ((buffers,),) = postgres.execute(postgres.url("postgres"), "SHOW shared_buffers")
    ((fsync,),) = postgres.execute(postgres.url("postgres"), "SHOW fsync")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "memory_gb": round(int(memory.split()[1]) / 1024**2, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "postgresql": f"{version} (shared_buffers {buffers}, fsync {fsync}, same machine)",
        "load_average": os.getloadavg()[0],
    }


def _read(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def text(about: dict[str, Any], contests: Sequence[Contest], idle: Idle | None) -> str:
    """All that is printed at the end."""
    lines = [", ".join(f"{key}: {value}" for key, value in about.items()), ""]
    if contests:
        lines += [*_table(contests), ""]
    for contest in contests:
        lines += _ratio_lines(contest)
    if idle is not None:
        lines += [
            f"idle memory: {idle.started_mb:.0f} MB after the start, {idle.warm_mb:.0f} MB after "
            f"10,000 events (goal < {GOAL_MB:.0f}: {_verdict(idle.warm_mb < GOAL_MB)})"
        ]
    return "\n".join(lines)


def _table(contests: Sequence[Contest]) -> list[str]:
    rows = [["", "", *(title for title, _ in _COLUMNS.values())]]
    for contest in contests:
        for rival in contest.samples:
            medians = [(contest.median(rival, what), form) for what, (_, form) in _COLUMNS.items()]
            cells = ["" if value is None else format(value, form) for value, form in medians]
            rows.append([contest.name, rival, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _ratio_lines(contest: Contest) -> list[str]:
    lines = []
    for (ours, rival), ratio in contest.ratios().items():
        goal = contest.goals.get(rival)
        judged = "" if goal is None else f"; goal >= {goal}: {_verdict(ratio.median >= goal)}"
        lines.append(
            f"{contest.name}: {ours} / {rival} = {ratio.median:.2f} (median of "
            f"{len(contest.samples[ours])}, spread {ratio.least:.2f}..{ratio.most:.2f}{judged})"
        )
    return lines


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def write(
    file: Path, about: dict[str, Any], contests: Sequence[Contest], idle: Idle | None
) -> None:
    """All samples as JSON."""
    results = {
        "machine": about,
        "contests": [asdict(contest) for contest in contests],
        "idle": None if idle is None else asdict(idle),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
