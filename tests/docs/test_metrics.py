"""The dashboard and the alert rules name metrics and labels that there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.docs.metrics import check, families
from tests.docs.pages import ROOT

DOCS = ROOT / "docs"


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
def test_metrics_exist(expressions: Any) -> None:
    for expression in expressions():
        check(expression)


def test_dashboard_shows_every_metric() -> None:
    shown = " ".join(dashboard())
    assert sorted(name for name in families() if name not in shown) == []
