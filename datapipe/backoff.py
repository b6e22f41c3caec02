"""Back-off: how long to wait after so many failures in a row."""

from __future__ import annotations

import random


def backoff(failures: int, max_s: float) -> float:
    """Seconds, with jitter: about 0.25 after the first, twice as long each time, up to `max_s`."""
    jitter = random.uniform(0.0, min(1.0, max_s / 8))
    return min(max_s, 0.25 * 2.0 ** min(failures - 1, 30) + jitter)
