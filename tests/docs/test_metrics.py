"""The dashboard and the alert rules name metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from datapipe.metrics import REASONS, Metrics

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting", "parked")


@pytest.fixture
def exposed() -> dict[str, set[str]]:
    """The names of all samples at /metrics, and the labels of each."""
    lane: dict[str, Any] = dict.fromkeys(NUMBERS, 0)
    lane |= {"oldest_seconds": 0, "blocked": None, "waiting_bytes": 0}
    metrics = Metrics()
    metrics.load_seconds.observe(1)
    metrics.append_seconds.observe(1)
    status = {
        "lanes": {"install": lane},
        "rejected": {"busy": 1},
        "mirror": {"calls": {"post": 1}, "up": True},
        "database": {"up": True},
    }
    metrics.expose(lambda: status, lambda: [metrics.histograms()])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def dashboard() -> Iterator[str]:
    content = json.loads((DOCS / "grafana.json").read_text())
    for panel in content["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (v["query"] for v in content["templating"]["list"] if v["type"] == "query")


def alerts() -> Iterator[str]:
    for group in yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
            yield rule["expr"]


@pytest.mark.parametrize("expressions", [dashboard, alerts])
def test_metrics_exist(expressions: Any, exposed: dict[str, set[str]]) -> None:
    for expression in expressions():
        named = re.findall(r"datapipe_\w+(?:\{[^}]*\})?", expression)
        assert named, expression
        for use in named:
            name, _, selector = use.partition("{")
            assert name in exposed, f"{name} in {expression}"
            labels = set(re.findall(r"(\w+)\s*[!=]=?~?\s*\"", selector)) - {"job"}
            assert labels <= exposed[name], use
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            known = set().union(*(exposed[use.split("{")[0]] for use in named))
            assert {label.strip() for label in grouping.split(",")} <= known, expression
        for reason in re.findall(r'reason!?="(\w+)"', expression):
            assert reason in REASONS


def test_dashboard_shows_every_metric(exposed: dict[str, set[str]]) -> None:
    shown = " ".join(dashboard())
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exposed}
    assert sorted(name for name in families if name not in shown) == []
