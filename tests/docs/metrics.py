"""The metrics that there are, and whether an expression in PromQL names them rightly."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

from datapipe.monitor.metrics import REASONS, Metrics

NUMBERS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting", "parked")


@cache
def exposed() -> dict[str, set[str]]:
    """As `labels`, of a made-up status with something of everything."""
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
        "mirror": {"calls": {"post": 1}, "up": True, "bytes": 1, "max_bytes": 2}
        | {"used": 0.5, "fullest": None},
        "database": {"up": True},
    }
    return labels(metrics.text(status, [metrics.histograms()]).decode())


def labels(text: str) -> dict[str, set[str]]:
    """What a scrape shows: the names of all samples, and the labels of each."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def families() -> set[str]:
    """The names of ours, without what a histogram adds to its own."""
    ours = [name for name in exposed() if name.startswith("datapipe_")]
    return {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in ours}


# what Grafana puts in, or a person at the top of the dashboard
_VARIABLES = {"$__rate_interval": "5m", "$over": "sum", "$job": "datapipe", "$lane": "install"}
_TARGET = {"job", "instance"}  # Prometheus adds these, and `up`, to what a target shows


def check(expression: str) -> None:
    """Raises: AssertionError, ValueError: it is no PromQL, or names what is not there."""
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    assert _labels(promql.parse(expression)) is not None, f"{expression} names no metric"


def _labels(node: Any) -> set[str] | None:
    """The labels that a part of an expression can have; None if it names no metric."""
    if isinstance(node, promql.VectorSelector):
        known = exposed() | {"up": set()}
        assert node.name in known, f"{node.name}: there is no such metric"
        there = known[node.name] | _TARGET
        for matcher in node.matchers.matchers:
            assert matcher.name in there, f"{node.name} has no label {matcher.name}"
            assert matcher.name != "reason" or matcher.value in REASONS, matcher.value
        return there
    if isinstance(node, promql.MatrixSelector):
        return _labels(node.vector_selector)
    if isinstance(node, promql.AggregateExpr):
        inner = _labels(node.expr) or set()
        named = set(node.modifier.labels) if node.modifier else set()
        assert named <= inner, f"{node.prettify()}: there are {sorted(inner)}"
        without = node.modifier and node.modifier.type == promql.AggModifierType.Without
        return inner - named if without else named
    found = [each for part in _within(node) if (each := _labels(part)) is not None]
    return set[str]().union(*found) if found else None


def _within(node: Any) -> list[Any]:
    if isinstance(node, promql.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql.Call):
        return list(node.args)
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr):
        return [node.expr]
    assert isinstance(node, promql.NumberLiteral), node.prettify()
    return []
