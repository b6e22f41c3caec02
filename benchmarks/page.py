"""docs/benchmarks.md and its pictures, made of what was measured.

A part without results keeps the section and the goals that the page has of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.chart import Bar, Group, svg
from benchmarks.limits import LIMITS
from benchmarks.measure import Contest, Goal, Spread
from benchmarks.results import Result

FIGURES = {  # the title of its column, and its format
    "rate": ("events/s", ",.0f"),
    "committed_rate": ("events/s until committed", ",.0f"),
    "top_rate": ("top rate", ",.0f"),
    "p50_ms": ("p50 ms", ".2f"),
    "p99_ms": ("p99 ms", ".2f"),
    "inside_p50_ms": ("inside p50 ms", ".2f"),
    "inside_p99_ms": ("inside p99 ms", ".2f"),
    "late_p50_ms": ("delay p50 ms", ".2f"),
    "late_p99_ms": ("delay p99 ms", ".2f"),
    "late_max_ms": ("longest delay ms", ".1f"),
    "loads": ("loads", ",.0f"),
    "loaded": ("rows loaded", ",.0f"),
    "lag_p50_s": ("lag p50 s", ".1f"),
    "lag_p99_s": ("lag p99 s", ".1f"),
    "lag_max_s": ("longest lag s", ".1f"),
    "ready_s": ("ready s", ".2f"),
    "recovered_s": ("all counted s", ".2f"),
    "first_s": ("first loaded s", ".1f"),
    "drain_s": ("all loaded s", ".1f"),
    "share": ("share", ".3f"),
    "requests": ("requests", ",.0f"),
    "requests_per_million": ("requests/M events", ",.0f"),
    "cpu_s_per_million": ("CPU s/M events", ".2f"),
    "generator_s_per_million": ("generator's CPU s/M events", ".2f"),
    "nats_s_per_million": ("NATS servers' CPU s/M events", ".2f"),
    "postgres_s_per_million": ("PostgreSQL's CPU s/M events", ".2f"),
    "database_s_per_million": ("database server's CPU s/M events", ".2f"),
    "started_mb": ("MB after the start", ".0f"),
    "warm_mb": ("MB after a million events", ".0f"),
    "peak_mb": ("peak MB", ".0f"),
    "service_mb": ("MB after it", ".0f"),
    "node_mb": ("MB of a node after it", ".0f"),
    "reserved_mb": ("MB reserved on a node", ".0f"),
    "stored_mb": ("MB stored on a node", ".1f"),
    "server_cores": ("cores", ".2f"),
    "generator_cores": ("generator's cores", ".2f"),
    "machine_cores": ("machine's busy cores", ".2f"),
}
_INTRO = """\
# Benchmarks

How fast datapipe is beside what you could use instead, measured on one machine in one run.
`make bench` writes this page (`python -m benchmarks --help` lists its parts).

- **Figures**: rivals take turns (A B A B). A figure is the median of its runs; the small ones are
  the lowest and the highest. A ratio is of runs that followed each other.
- **Batches** are POSTs with many events: *batches of 1,000* have 1,000 each.
- **CPU, cores and memory** are those of the server with all its processes, without PostgreSQL
  unless it says so. MB are 10^6 bytes; *peak* is the most resident memory.
- **The generator** (wrk, one thread) is not the bottleneck where its cores are below 1 and its
  limit is well above the figure. On so few cores it takes its share of the machine from every
  rival alike.
"""
_TABLE = "| part | goal | wanted | measured | |\n| --- | --- | --- | --- | --- |"


class Part(NamedTuple):
    """A part of the benchmark: its name, heading and what is said of it."""

    name: str
    title: str
    text: str

    @property
    def link(self) -> str:
        return f"[{self.title}](#{self.title.lower().replace(' ', '-')})"


def write(file: Path, parts: Sequence[Part], results: Mapping[str, Result]) -> None:
    """Write the page anew, and the pictures of the parts that have results."""
    before = file.read_text() if file.exists() else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows, sections, machine = [], [], _between(before, "**Machine:** ", "\n")
    for part in parts:
        if result := results.get(part.name):
            machine = result.machine
            rows += _goals(part, result.contests)
            picture = _picture(part, result.contests)
            name = f"{file.stem}-{part.name}.svg"
            if picture:
                (file.parent / name).write_text(picture)
            sections.append(_section(part, result, name if picture else ""))
        else:
            rows += [line for line in before.splitlines() if line.startswith(f"| {part.link}")]
            sections.append(_between(before, f"\n## {part.title}\n", "\n## ", whole=True))
    head = f"{_INTRO}\n**Machine:** {machine}\n\n## Goals\n\n" + "\n".join([_TABLE, *rows])
    file.write_text("\n\n".join(text.strip() for text in [head, *sections] if text) + "\n")


def _between(text: str, start: str, end: str, whole: bool = False) -> str:
    """From one mark to the next, or to the end of the text; `whole`: with the first mark."""
    found = re.search(f"{re.escape(start)}(.*?)(?={re.escape(end)}|\\Z)", text, re.DOTALL)
    return found[0 if whole else 1] if found else ""


# --- goals ---


def _goals(part: Part, contests: Sequence[Contest]) -> list[str]:
    """A row for each goal; of one that several contests have, the worst."""
    found: dict[str, list[tuple[Goal, Contest, Spread | None]]] = {}
    for contest in contests:
        for goal in contest.goals:
            found.setdefault(goal.what, []).append((goal, contest, contest.judge(goal)))
    return [_goal(part, what, of_goal) for what, of_goal in found.items()]


def _goal(part: Part, what: str, found: Sequence[tuple[Goal, Contest, Spread | None]]) -> str:
    known = [(goal, contest, spread) for goal, contest, spread in found if spread is not None]
    goal = found[0][0]
    wanted = f">= {_plain(goal.least)}" if goal.least is not None else f"<= {_plain(goal.most)}"
    if len(known) < len(found):
        missing = next(contest for _, contest, spread in found if spread is None)
        why = missing.left_out.get(goal.rival) or missing.left_out.get(goal.ours) or ""
        cells = (f"not measured{': ' if why else ''}{why}", "")
    else:
        goal, contest, spread = min(known, key=lambda each: each[0].distance(each[2]))
        where = _where(goal, contest, found)
        form = _ratio_form(spread) if goal.rival else FIGURES[goal.figure][1]
        note = LIMITS.get(what, "")
        verdict = "met" if goal.met(spread) else f"**MISSED**{': ' if note else ''}{note}"
        cells = (_spread(spread, form) + where, verdict)
    return "| " + " | ".join([part.link, what, wanted, *map(_cell, cells)]) + " |"


def _where(
    goal: Goal, contest: Contest, found: Sequence[tuple[Goal, Contest, Spread | None]]
) -> str:
    """Which of several it was."""
    contests = {contest.name for _, contest, _ in found}
    names = [contest.name] if len(contests) > 1 else []
    names += [goal.ours] if len({goal.ours for goal, _, _ in found}) > 1 else []
    return f" ({', '.join(names)})" if names else ""


def _plain(value: float | None) -> str:
    return format(value, ",.0f" if value and value >= 10 else ".3g")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- a section ---


def _section(part: Part, result: Result, picture: str) -> str:
    blocks = [f"## {part.title}", part.text.strip()]
    if picture:
        blocks.append(f"![{part.title}, as bars]({picture})")
    for contest in result.contests:
        blocks += [f"### {_capital(contest.name)}", _table(contest)]
        blocks += [f"Left out: {name} ({why})." for name, why in contest.left_out.items()]
    blocks.append(f"<sub>{result.how}; {result.machine}</sub>")
    return "\n\n".join(blocks)


def _table(contest: Contest) -> str:
    """A row for each rival, with its ratio in the first figure that is drawn."""
    shown = [key for key in FIGURES if any(contest.spread(name, key) for name in contest.samples)]
    first, *others = contest.samples
    of = contest.drawn[0] if contest.drawn and others else ""
    ours = first == "datapipe"  # is measured by its rivals; else the first measures the others
    titles = [FIGURES[key][0] for key in shown]
    if of:
        said = "datapipe / it" if ours else f"it / {first}"
        titles.insert(1, said if of == "rate" else f"{FIGURES[of][0]}, {said}")
    lines = [["", *titles], ["---", *["---:"] * len(titles)]]
    for name in contest.samples:
        cells = [_known(contest.spread(name, key), FIGURES[key][1]) for key in shown]
        if of:
            pair = (first, name) if ours else (name, first)
            ratio = contest.ratio(*pair, of) if name != first else None
            cells.insert(1, _spread(ratio, _ratio_form(ratio)) if ratio else "")
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _ratio_form(spread: Spread) -> str:
    """So that 0.896 does not read as if it were 0.9."""
    return ".3f" if spread.median < 1 else ".2f"


def _known(spread: Spread | None, form: str) -> str:
    return _spread(spread, form) if spread else ""


def _spread(spread: Spread, form: str) -> str:
    median, least, most = (
        format(value, form) for value in (spread.median, spread.least, spread.most)
    )
    return median if least == most else f"{median} <sub>{least} to {most}</sub>"


def _picture(part: Part, contests: Sequence[Contest]) -> str:
    groups = []
    for contest in contests:
        drawn = [name for name in contest.samples if name not in contest.undrawn]
        for key in contest.drawn:
            title, form = FIGURES[key]
            bars = [
                Bar(name, spread, name.startswith("datapipe") or "datapipe" not in contest.samples)
                for name in drawn
                if (spread := contest.spread(name, key))
            ]
            if bars:
                groups.append(Group(f"{_capital(contest.name)}: {title}", form, bars))
    return svg(part.title, groups) if groups else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
