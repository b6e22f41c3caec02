"""Back-off: how long to wait after so many failures in a row."""

from __future__ import annotations

import tenacity


class Backoff:
    """Exponential, with jitter: about 0.25 s at first, twice as long each time, up to `max_s`."""

    def __init__(self, max_s: float) -> None:
        self._strategy = tenacity.wait_exponential_jitter(
            multiplier=0.25, max=max_s, jitter=min(1.0, max_s / 8)
        )

    def seconds(self, failures: int) -> float:
        """The wait after this many failures in a row, from 1."""
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = failures
        return float(self._strategy(state))
