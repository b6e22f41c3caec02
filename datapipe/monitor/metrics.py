"""`GET /metrics`: Prometheus text, read off the books at each scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

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


_C, _G = CounterMetricFamily, GaugeMetricFamily


class Family(NamedTuple):
    """A metric: its values by label, of `/status.json`; without a label, one value under ""."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    text: str
    label: str
    values: Callable[[Status], Mapping[str, float]]


def _lanes(key: str) -> Callable[[Status], Mapping[str, float]]:
    return lambda status: {name: lane.get(key) or 0 for name, lane in status["lanes"].items()}


def _one(part: str, key: str) -> Callable[[Status], Mapping[str, float]]:
    return lambda status: {"": status[part][key]}


_FAMILIES = (
    Family(_C, "events_accepted", "Events answered with 200, or stored without an answer.", "lane",
           _lanes("accepted")),
    Family(_C, "events_recovered", "Events found in the mirror, or adopted from a dead process.",
           "lane", _lanes("recovered")),
    Family(_C, "events_loaded", "Events that are rows of their table.", "lane", _lanes("loaded")),
    Family(_C, "events_duplicate", "Events skipped at loading: the ledger knew them.", "lane",
           _lanes("duplicate")),
    Family(_C, "events_dead", "Events that the database refused.", "lane", _lanes("dead")),
    Family(_C, "events_replayed", "Dead letters put back into their table.", "lane",
           _lanes("replayed")),
    Family(_C, "events_rejected", "Events, or whole bodies, that were refused.", "reason",
           lambda status: dict.fromkeys(REASONS, 0) | status["rejected"]),
    Family(_C, "mirror_requests", "Requests to the mirror.", "call",
           lambda status: status["mirror"]["calls"]),
    Family(_G, "waiting_events", "Events that are not loaded yet.", "lane", _lanes("waiting")),
    Family(_G, "parked_events", "Events that wait in the mirror alone.", "lane", _lanes("parked")),
    Family(_G, "oldest_waiting_seconds", "Age of the oldest event that waits.", "lane",
           _lanes("oldest_seconds")),
    Family(_G, "lane_blocked", "1 while a person must act for this lane.", "lane",
           lambda status: {k: v["blocked"] is not None for k, v in status["lanes"].items()}),
    Family(_G, "waiting_bytes", "Bytes of waiting rows.", "", _one("totals", "waiting_bytes")),
    Family(_G, "database_up", "1 if the last work with the database succeeded.", "",
           _one("database", "up")),
    Family(_G, "mirror_up", "1 if the last work with the mirror succeeded.", "",
           _one("mirror", "up")),
)  # fmt: skip


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
            "datapipe_mirror_append_seconds", "Time until the mirror had stored an append.",
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
        added = []
        for own in self._all:
            # a process of release 1.0 beside this one lacks some
            values = [each[own.name] for each in histograms if own.name in each]
            total = {le: sum(each[le] for each in values) for le in values[0]}
            seconds = total.pop("sum")
            added.append(HistogramMetricFamily(own.name, own.text, list(total.items()), seconds))
        families = [_metric(family, status) for family in _FAMILIES]
        return generate_latest(_Collected([*added, *families]))


def _metric(family: Family, status: Status) -> Metric:
    labels = [family.label] if family.label else []
    metric = family.kind(f"datapipe_{family.name}", family.text, labels=labels)
    for label, value in family.values(status).items():
        metric.add_metric([label] if labels else [], float(value))
    return metric


class _Collected(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)
