"""The metrics that there are, and whether an expression in PromQL names them rightly."""

from __future__ import annotations

import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from datapipe.monitor.metrics import REASONS, Metrics

NUMBERS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting", "parked")


def exposed() -> dict[str, set[str]]:
    """The names of all samples at /metrics, and the labels of each."""
    lane: dict[str, Any] = dict.fromkeys(NUMBERS, 0)
    lane |= {"oldest_seconds": 0, "blocked": None, "waiting_bytes": 0, "balanced": True}
    metrics = Metrics()
    status = {
        "version": "1.0",
        "lanes": {"install": lane},
        "dead_letters": {"at": "2026-11-22T12:00:00Z", "lanes": {"install": 1}},
        "totals": {"waiting_bytes": 0},
        "rejected": {"busy": 1},
        "keys": {"ios": {"accepted": 1, "rejected": 1, "limited": 1}},
        "mirror": {"calls": {"post": 1}, "up": True, "bytes": 1, "max_bytes": 2},
        "database": {"up": True},
    }
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(
        metrics.text(status, [metrics.histograms()]).decode()
    ):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def families() -> set[str]:
    """The names of ours, without what a histogram adds to its own."""
    ours = [name for name in exposed() if name.startswith("datapipe_")]
    return {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in ours}


def check(expression: str) -> None:
    """Raises: AssertionError: a metric, a label or a reason that there is not; an open bracket."""
    known = exposed()
    named = re.findall(r"\b(?:datapipe|process)_\w+(?:\{[^}]*\})?", expression)
    assert named, expression
    for use in named:
        name, _, selector = use.partition("{")
        assert name in known, f"{name} in {expression}"
        labels = set(re.findall(r"(\w+)\s*[!=]=?~?\s*\"", selector)) - {"job"}
        assert labels <= known[name], use
    for grouping in re.findall(r"by \(([^)]*)\)", expression):
        labels = set().union(*(known[use.split("{")[0]] for use in named))
        assert {label.strip() for label in grouping.split(",")} <= labels, expression
    for reason in re.findall(r'reason!?="(\w+)"', expression):
        assert reason in REASONS
    for opened, closed in ("()", "[]", "{}"):
        assert expression.count(opened) == expression.count(closed), expression
