"""Back-off: how long to wait after so many failures in a row."""

from __future__ import annotations

import random


def backoff(failures: int, max_s: float) -> float:
    """Seconds: 0.25 to 0.5 after the first, twice as long each time, up to `max_s`.

    Half of it is by chance, at the bound too: what failed together must not come back together.
    """
    most = min(max_s, 0.5 * 2.0 ** min(failures - 1, 30))
    return random.uniform(most / 2, most)
