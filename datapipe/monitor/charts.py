"""The charts: paths in the units of the data, which the SVG stretches to the room there is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from datapipe.monitor.history import POINTS, STEP_S

LAST, STEP = POINTS - 1, STEP_S  # the step that stands at the right edge; its length in seconds
SMALL_WIDTH, SMALL_HEIGHT = 60, 20  # of a small chart, each of whose points is the most of some
_POINTS_IN_ONE = POINTS // SMALL_WIDTH


def top(*series: Sequence[float]) -> float:
    """The value at the upper edge: 1, 2 or 5 times a power of ten, and at least 1."""
    most = max((value for values in series for value in values), default=0)
    if most <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= most)


def path(values: Sequence[float], most: float) -> str:
    """`M170 -20L170 12 171 7.5...`: by step, and closed out of sight, so that it can be filled."""
    if not values:
        return ""
    first = LAST - len(values) + 1
    points = " ".join(f"{x} {value}" for x, value in enumerate(values, first))
    return f"M{first} {-most}L{points}H{POINTS + 9}V{-most}Z"


def small(values: Sequence[float]) -> str:
    """A chart without a scale, as high as its highest point, in few characters: `M57 20V7h1V20...`.

    Its points are as wide as one of their units, from top to bottom; where nothing was, is nothing.
    """
    # aligned at the newest, as all charts are
    most = max(values, default=0) or 1
    bars: list[int] = []
    for end in range(len(values), 0, -_POINTS_IN_ONE):
        highest = max(values[max(0, end - _POINTS_IN_ONE) : end])
        bars.insert(0, math.ceil(highest / most * SMALL_HEIGHT))
    if not any(bars):
        return ""
    x = SMALL_WIDTH - len(bars)
    heights = "".join(f"V{SMALL_HEIGHT - bar}h1" for bar in bars)
    return f"M{x} {SMALL_HEIGHT}{heights}V{SMALL_HEIGHT}Z"
