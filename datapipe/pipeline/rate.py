"""A rate over the last minute or so."""

from __future__ import annotations

import time
from collections import deque


class Rate:
    """Amounts as they come, and how much that is a second."""

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._amounts: deque[tuple[float, float]] = deque()

    def add(self, amount: float) -> None:
        now = time.monotonic()
        self._amounts.append((now, amount))
        self._forget(now)

    def per_second(self) -> float:
        """0 when nothing came within the window."""
        now = time.monotonic()
        self._forget(now)
        if not self._amounts:
            return 0.0
        return sum(amount for _, amount in self._amounts) / max(now - self._amounts[0][0], 1.0)

    def _forget(self, now: float) -> None:
        while self._amounts and self._amounts[0][0] < now - self._window_s:
            self._amounts.popleft()
