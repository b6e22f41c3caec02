"""What is measured, and how it is compared: in turn (A B A B), as medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sample:
    """One run. `rate` is events a second; what was not measured is None."""

    rate: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_s_per_million: float | None = None
    peak_mb: float | None = None
    server_cores: float | None = None  # CPU seconds a second of the server
    generator_cores: float | None = None


@dataclass(slots=True)
class Ratio:
    """Of the runs that followed each other, one by one: so that both saw the same machine."""

    median: float
    least: float
    most: float


@dataclass(slots=True)
class Contest:
    """Samples of each rival, taken in turn. The first rival is the one that is looked at.

    Args: goals: ratios that are wanted, by the name of the rival.
    """

    name: str
    samples: dict[str, list[Sample]]
    goals: dict[str, float] = field(default_factory=dict)

    def ratios(self) -> dict[tuple[str, str], Ratio]:
        first, *rivals = self.samples
        found = {}
        for rival in rivals:
            pairs = zip(self.samples[first], self.samples[rival], strict=True)
            values = [ours.rate / theirs.rate for ours, theirs in pairs]
            found[first, rival] = Ratio(statistics.median(values), min(values), max(values))
        return found

    def median(self, rival: str, what: str) -> float | None:
        values = [getattr(sample, what) for sample in self.samples[rival]]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


def in_turn(
    name: str,
    rivals: Mapping[str, Callable[[], Sample]],
    runs: int,
    goals: Mapping[str, float] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Contest:
    """Run each rival once, then all of them again, `runs` times."""
    samples: dict[str, list[Sample]] = {rival: [] for rival in rivals}
    for number in range(1, runs + 1):
        for rival, run in rivals.items():
            sample = run()
            samples[rival].append(sample)
            say(f"{name}, run {number} of {runs}: {rival} {sample.rate:,.0f}/s")
    return Contest(name, samples, dict(goals or {}))
