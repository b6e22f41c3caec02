"""`GET /metrics`: Prometheus text, read off the books at each scrape.

Imported by the first scrape: with prometheus_client it takes 1 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from datapipe.monitor.aggregate import OUTCOMES
from datapipe.monitor.metrics import REASONS, Histogram, Samples, Status

_C, _G = CounterMetricFamily, GaugeMetricFamily


class Family(NamedTuple):
    """A metric: its values by label, of `/status.json`; without a label, one value under "".

    Two labels have a comma between their names; then values are by both.
    """

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    text: str
    label: str
    values: Callable[[Status], Mapping[Any, float]]


def _lanes(key: str) -> Callable[[Status], Mapping[str, float]]:
    return lambda status: {name: lane.get(key) or 0 for name, lane in status["lanes"].items()}


def _one(part: str, key: str) -> Callable[[Status], Mapping[str, float]]:
    return lambda status: {"": status[part][key]}


def _used(mirror: Mapping[str, Any]) -> float:
    used: float = mirror["used"] if mirror["fullest"] is None else mirror["fullest"]
    return used


_FAMILIES = (
    Family(_C, "events_accepted", "Events answered with 200, or stored without an answer.", "lane",
           _lanes("accepted")),
    Family(_C, "events_recovered",
           "Events found in the durable queue, or adopted from a dead process.", "lane",
           _lanes("recovered")),
    Family(_C, "events_loaded", "Events that are rows of their table.", "lane", _lanes("loaded")),
    Family(_C, "events_duplicate", "Events skipped at loading: the ledger knew them.", "lane",
           _lanes("duplicate")),
    Family(_C, "events_dead", "Events that the database refused.", "lane", _lanes("dead")),
    Family(_C, "events_replayed", "Dead letters put back into their table.", "lane",
           _lanes("replayed")),
    Family(_G, "dead_letters", "Dead letters that there are now, whoever wrote them.", "lane",
           lambda status: (status["dead_letters"] or {"lanes": {}})["lanes"]),
    Family(_C, "events_rejected", "Events, or whole bodies, that were refused.", "reason",
           lambda status: dict.fromkeys(REASONS, 0) | status["rejected"]),
    Family(_C, "key_events", "What was posted with named ingest keys.", "key,outcome",
           lambda status: {(k, o): v[o] for k, v in status["keys"].items() for o in OUTCOMES}),
    Family(_C, "mirror_requests", "Requests to the durable queue.", "call",
           lambda status: status["mirror"]["calls"]),
    Family(_G, "waiting_events", "Events that are not loaded yet.", "lane", _lanes("waiting")),
    Family(_G, "parked_events", "Events that wait on disk only, or in IronMQ or NATS only.",
           "lane", _lanes("parked")),
    Family(_G, "oldest_waiting_seconds", "Age of the oldest event that waits.", "lane",
           _lanes("oldest_seconds")),
    Family(_G, "lane_blocked", "1 while a person must act for this event type.", "lane",
           lambda status: {k: v["blocked"] is not None for k, v in status["lanes"].items()}),
    Family(_G, "books_balanced", "0 if an event is missing, or there is one too many.", "lane",
           _lanes("balanced")),
    Family(_G, "waiting_bytes", "Bytes of waiting rows.", "", _one("totals", "waiting_bytes")),
    Family(_G, "mirror_bytes", "Size of the durable queue.", "", _one("mirror", "bytes")),
    Family(_G, "mirror_max_bytes", "What it may hold.", "", _one("mirror", "max_bytes")),
    Family(_G, "mirror_used_ratio", "Share in use; of the fullest queue where each is limited.", "",
           lambda status: {"": _used(status["mirror"])}),
    Family(_G, "database_up", "1 if the last work with the database succeeded.", "",
           _one("database", "up")),
    Family(_G, "mirror_up", "1 if the last work with the durable queue succeeded.", "",
           _one("mirror", "up")),
    Family(_G, "build_info", "1, of this release.", "version",
           lambda status: {status["version"]: 1}),
)  # fmt: skip


def text(known: Sequence[Histogram], status: Status, histograms: Sequence[Samples]) -> bytes:
    """See `Metrics.text`. Args: known: this process's own, which say what there is."""
    added = []
    for own in known:
        # a process of release 1.0 beside this one lacks some
        values = [each[own.name] for each in histograms if own.name in each]
        total = {le: sum(each[le] for each in values) for le in values[0]}
        seconds = total.pop("sum")
        added.append(HistogramMetricFamily(own.name, own.text, list(total.items()), seconds))
    families = [_metric(family, status) for family in _FAMILIES]
    # `process_*`: of the process that answers alone
    process = ProcessCollector(registry=None).collect()
    return generate_latest(_Collected([*added, *families, *process]))


def _metric(family: Family, status: Status) -> Metric:
    labels = family.label.split(",") if family.label else []
    metric = family.kind(f"datapipe_{family.name}", family.text, labels=labels)
    for label, value in family.values(status).items():
        several = [label] if isinstance(label, str) else label
        metric.add_metric(several if labels else [], float(value))
    return metric


class _Collected(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)
