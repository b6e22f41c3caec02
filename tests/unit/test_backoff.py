"""Back-off: growing, bounded, and by chance at the bound too."""

from __future__ import annotations

import pytest

from datapipe.retry import backoff


@pytest.mark.parametrize("max_s", [0.05, 2.0, 5.0, 30.0])
def test_it_doubles_up_to_its_bound(max_s: float) -> None:
    for failures in (1, 2, 3, 4, 8, 50, 100_000):
        most = min(max_s, 0.5 * 2 ** min(failures - 1, 20))
        waits = [backoff(failures, max_s) for _ in range(200)]
        assert most / 2 <= min(waits)
        assert max(waits) <= most


@pytest.mark.parametrize("max_s", [2.0, 30.0])
def test_what_failed_together_does_not_come_together(max_s: float) -> None:
    waits = sorted(backoff(20, max_s) for _ in range(400))
    assert waits[100] < 0.7 * max_s < 0.8 * max_s < waits[300]
