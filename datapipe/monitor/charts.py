"""The pictures as the server draws them; `templates/charts.js` draws the same ones anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from datapipe.monitor.history import POINTS

WIDTH = 360  # units of the picture, not pixels: it is stretched to the room there is
HEIGHT = 80


def top(*series: Sequence[float]) -> float:
    """The value at the upper edge: 1, 2 or 5 times a power of ten, and at least 1."""
    most = max((value for values in series for value in values), default=0)
    if most <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= most)


def line(values: Sequence[float], most: float) -> str:
    """The path of one series; its last value stands at the right edge."""
    first = WIDTH - (len(values) - 1) * WIDTH / (POINTS - 1)
    points = (
        f"{first + i * WIDTH / (POINTS - 1):.1f} {HEIGHT - value / most * HEIGHT:.1f}"
        for i, value in enumerate(values)
    )
    return "M" + "L".join(points) if values else ""


def area(values: Sequence[float], most: float) -> str:
    """The same, filled down to the axis."""
    first = WIDTH - (len(values) - 1) * WIDTH / (POINTS - 1)
    return f"{line(values, most)}V{HEIGHT}H{first:.1f}Z" if values else ""
