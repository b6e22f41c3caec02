"""What is measured, and how it is compared: in turn (A B A B), as medians and ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

# One run: figures by name (`report.FIGURES` tells their units); `rate` is events a second.
Sample = dict[str, float]


@dataclass(slots=True)
class Bench:
    """What each part is given.

    Attributes: seconds: of a single run. minute: of a run that should be long, in seconds.
    """

    postgres: Any
    runs: int
    seconds: float
    minute: float
    say: Callable[[str], None]


@dataclass(slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Goal:
    """What is wanted of a figure of `ours`, or of its ratio to that of `rival`.

    The median is judged; with `every` it is the worst of the runs.
    """

    what: str
    ours: str
    rival: str = ""
    figure: str = "rate"
    least: float | None = None
    most: float | None = None
    every: bool = False

    def met(self, spread: Spread) -> bool:
        if self.least is not None:
            return (spread.least if self.every else spread.median) >= self.least
        assert self.most is not None
        return (spread.most if self.every else spread.median) <= self.most

    def distance(self, spread: Spread) -> float:
        """How far from being missed, as a factor: the smallest of several is told."""
        if self.least is not None:
            return (spread.least if self.every else spread.median) / self.least
        assert self.most is not None
        return self.most / max(spread.most if self.every else spread.median, 1e-9)


def percentile(buckets: Mapping[float, float], share: float) -> float | None:
    """Below which value such a share of observations lies; None without any.

    Args: buckets: how many were at most so large, by that bound; in between they are taken to be
        spread evenly, and those beyond the last finite bound to lie there.
    """
    wanted = share * max(buckets.values(), default=0)
    if not wanted:
        return None
    below, beneath = 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= wanted and math.isfinite(bound):
            return below + (bound - below) * (wanted - beneath) / (count - beneath)
        if math.isfinite(bound):
            below, beneath = bound, count
    return below


def memory_goals(what: str, *rivals: str) -> list[Goal]:
    """That each of them stays within 200 MB in every run."""
    return [
        Goal(f"{what}, peak MB", each, figure="peak_mb", most=200, every=True) for each in rivals
    ]


@dataclass(slots=True)
class Contest:
    """Samples of each rival, taken in turn. The first rival is the one that is looked at.

    Attributes: drawn: the figures that the picture shows. undrawn: rivals so far above the others
        that a bar would say nothing. left_out: why, by rival.
    """

    name: str
    samples: dict[str, list[Sample]]
    goals: list[Goal] = field(default_factory=list)
    drawn: list[str] = field(default_factory=lambda: ["rate"])
    undrawn: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def spread(self, rival: str, figure: str) -> Spread | None:
        """Of the runs that have the figure; None if none has."""
        values = [sample[figure] for sample in self.samples.get(rival, []) if figure in sample]
        return Spread.of(values) if values else None

    def ratio(self, ours: str, rival: str, figure: str = "rate") -> Spread | None:
        """Of the runs that followed each other, one by one: so that both saw the same machine."""
        pairs = zip(self.samples.get(ours, []), self.samples.get(rival, []), strict=False)
        values = [a[figure] / b[figure] for a, b in pairs if figure in a and b.get(figure)]
        return Spread.of(values) if values else None

    def judge(self, goal: Goal) -> Spread | None:
        """The figure that the goal is about; None if it was not measured."""
        if goal.rival:
            return self.ratio(goal.ours, goal.rival, goal.figure)
        return self.spread(goal.ours, goal.figure)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "goals": [Goal(**goal) for goal in value["goals"]]})


def in_turn(
    name: str,
    rivals: Mapping[str, Callable[[], Sample]],
    bench: Bench,
    goals: Sequence[Goal] = (),
    drawn: Sequence[str] = ("rate",),
    undrawn: Sequence[str] = (),
) -> Contest:
    """Run each rival once, then all of them again, `bench.runs` times.

    A rival that fails is left out from there on, and the contest says why.

    Raises: Exception: what the first rival raised.
    """
    first = next(iter(rivals))
    contest = Contest(
        name, {rival: [] for rival in rivals}, list(goals), list(drawn), list(undrawn)
    )
    for number in range(1, bench.runs + 1):
        for rival, run in rivals.items():
            if rival in contest.left_out:
                continue
            try:
                sample = run()
            except Exception as exc:
                if rival == first:
                    raise
                reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
                contest.left_out[rival] = f"run {number}: {reason}"
                bench.say(f"{name}: {rival} is left out: {exc}")
                continue
            contest.samples[rival].append(sample)
            told = ", ".join(f"{figure} {value:,.4g}" for figure, value in sample.items())
            bench.say(f"{name}, run {number} of {bench.runs}: {rival}: {told}")
    contest.samples = {rival: of for rival, of in contest.samples.items() if of}
    return contest
