"""What is measured of this process, for `GET /metrics`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from datapipe.errors import Reason

REASONS = tuple(reason.label for reason in Reason)
# close together where answers lie, so that a percentile can be read off
_REQUEST_BOUNDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015,
    0.02, 0.025, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30,
)  # fmt: skip
_APPEND_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LOAD_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

Status = Mapping[str, Any]
Samples = dict[str, dict[str, float]]


class Histogram:
    """How many observations took at most so long, and their sum, in seconds.

    Where each POST is observed, prometheus_client's own is too dear: a microsecond and a lock. This
    one has none: all observations and readings are the event loop's.
    """

    __slots__ = ("_bounds", "_counts", "_sum", "name", "text")

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last: longer than all of them
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def samples(self) -> dict[str, float]:
        """How many took at most `le` seconds, by `le` as Prometheus writes it, and their sum."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return dict(zip(bounds, accumulate(self._counts), strict=True)) | {"sum": self._sum}


class Metrics:
    """The histograms of this process, and the text of all metrics of all processes."""

    def __init__(self) -> None:
        self.request_seconds = Histogram(
            "datapipe_request_seconds",
            "Time from a POST's bytes here until its answer is written.",
            _REQUEST_BOUNDS,
        )
        self.load_seconds = Histogram(
            "datapipe_load_seconds", "Time of one load, one transaction.", _LOAD_BOUNDS
        )
        self.append_seconds = Histogram(
            "datapipe_mirror_append_seconds", "Time until the durable queue had stored an append.",
            _APPEND_BOUNDS,
        )  # fmt: skip
        self._all = (self.request_seconds, self.load_seconds, self.append_seconds)

    def histograms(self) -> Samples:
        """By name, the samples by their `le`, and their sum."""
        return {each.name: each.samples() for each in self._all}

    def text(self, status: Status, histograms: Sequence[Samples]) -> bytes:
        """What `/metrics` answers; thousands of lanes take their time.

        Args: status: as `/status.json` shows it. histograms: those of each process.
        """
        from datapipe.monitor import exposition

        return exposition.text(self._all, status, histograms)
