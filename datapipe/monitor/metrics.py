"""`GET /metrics`: Prometheus text, read off the books at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from datapipe.errors import Reason

REASONS = tuple(reason.label for reason in Reason)

_LANE_COUNTERS = {
    "accepted": "Events answered with 200, or stored without an answer.",
    "recovered": "Events found in the mirror, or adopted from a dead process.",
    "loaded": "Events that are rows of their table.",
    "duplicate": "Events skipped at loading: the ledger knew them.",
    "dead": "Events that the database refused.",
    "replayed": "Dead letters put back into their table.",
}
_LANE_GAUGES = {
    "waiting": ("datapipe_waiting_events", "Events that are not loaded yet."),
    "parked": ("datapipe_parked_events", "Events that wait in the mirror alone."),
    "oldest_seconds": ("datapipe_oldest_waiting_seconds", "Age of the oldest event that waits."),
}
_APPEND_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


Samples = dict[str, dict[str, float]]


class Metrics(Collector):
    """The histograms, and a collector over what `/status.json` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.load_seconds = Histogram(
            "datapipe_load_seconds", "Time of one load, one transaction.",
            buckets=_LOAD_BUCKETS, registry=None,
        )  # fmt: skip
        self.append_seconds = Histogram(
            "datapipe_mirror_append_seconds", "Time until the mirror had stored an append.",
            buckets=_APPEND_BUCKETS, registry=None,
        )  # fmt: skip
        self._status: Callable[[], Mapping[str, Any]] = dict
        self._histograms: Callable[[], Sequence[Samples]] = tuple
        self._seen: tuple[Mapping[str, Any], Sequence[Samples]] = ({}, ())

    def expose(
        self, status: Callable[[], Mapping[str, Any]], histograms: Callable[[], Sequence[Samples]]
    ) -> None:
        """Serve these numbers, of all processes, from now on; called at each scrape."""
        self._status, self._histograms = status, histograms
        self.registry.register(self)

    def histograms(self) -> Samples:
        """This process's histograms: by name, the samples by their `le`, and their sum."""
        found: Samples = {}
        for histogram in (self.load_seconds, self.append_seconds):
            (metric,) = histogram.collect()
            found[metric.name] = {
                sample.labels.get("le", "sum"): sample.value
                for sample in metric.samples
                if sample.name.endswith(("_bucket", "_sum"))
            }
        return found

    def _added(self, everybody: Sequence[Samples]) -> Iterator[Metric]:
        """The histograms of all processes, added up."""
        for histogram in (self.load_seconds, self.append_seconds):
            (metric,) = histogram.collect()
            values = [each[metric.name] for each in everybody]
            added = {le: sum(each[le] for each in values) for le in values[0]}
            total = added.pop("sum")
            yield HistogramMetricFamily(
                metric.name, metric.documentation, list(added.items()), total
            )

    def take(self) -> None:
        """Take the numbers as they are now, for `text`."""
        self._seen = self._status(), self._histograms()

    def text(self) -> bytes:
        """The numbers that were taken last. For a thread: thousands of lanes take their time."""
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        status, histograms = self._seen
        yield from self._added(histograms)
        lanes = status["lanes"]
        for key, text in _LANE_COUNTERS.items():
            counter = CounterMetricFamily(f"datapipe_events_{key}", text, labels=["lane"])
            yield _labelled(counter, {name: lane.get(key, 0) for name, lane in lanes.items()})
        rejected = CounterMetricFamily(
            "datapipe_events_rejected", "Events, or whole bodies, refused at the door.",
            labels=["reason"],
        )  # fmt: skip
        yield _labelled(rejected, {reason: status["rejected"].get(reason, 0) for reason in REASONS})
        for key, (name, text) in _LANE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["lane"])
            yield _labelled(gauge, {name: lane[key] for name, lane in lanes.items()})
        blocked = GaugeMetricFamily(
            "datapipe_lane_blocked", "1 while a person must act for this lane.", labels=["lane"]
        )
        yield _labelled(blocked, {name: bool(lane["blocked"]) for name, lane in lanes.items()})
        waiting = sum(lane["waiting_bytes"] for lane in lanes.values())
        yield GaugeMetricFamily("datapipe_waiting_bytes", "Bytes of waiting rows.", value=waiting)
        calls = CounterMetricFamily(
            "datapipe_mirror_requests", "Requests to the mirror.", labels=["call"]
        )
        yield _labelled(calls, status["mirror"]["calls"])
        yield GaugeMetricFamily(
            "datapipe_database_up", "1 if the last work with the database succeeded.",
            value=float(status["database"]["up"]),
        )  # fmt: skip
        yield GaugeMetricFamily(
            "datapipe_mirror_up", "1 if the last work with the mirror succeeded.",
            value=float(status["mirror"]["up"]),
        )  # fmt: skip


_Labelled = TypeVar("_Labelled", CounterMetricFamily, GaugeMetricFamily)


def _labelled(metric: _Labelled, values: Mapping[str, float]) -> _Labelled:
    for label, value in values.items():
        metric.add_metric([label], float(value))
    return metric
