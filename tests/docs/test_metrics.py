"""The dashboard and the alert rules name metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.docs.metrics import check, exposed, families, labels
from tests.docs.pages import ROOT
from tests.postgres import Postgres
from tests.service import Service, until

DOCS = ROOT / "docs"


def dashboard() -> Iterator[str]:
    content = json.loads((DOCS / "grafana.json").read_text())
    for panel in content["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in content["templating"]["list"]:
        if variable["type"] == "query":  # Grafana's own: the values of a metric's label
            yield re.sub(r"label_values\((\w+), (\w+)\)", r"sum by (\2) (\1)", variable["query"])


def alerts() -> Iterator[str]:
    for group in yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
            yield rule["expr"]


@pytest.mark.parametrize("expressions", [dashboard, alerts])
def test_metrics_exist(expressions: Any) -> None:
    for expression in expressions():
        check(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "rate(datapipe_nope[5m])", 'datapipe_events_loaded_total{name="a"}', "sum by (reason) (up)",
        'datapipe_events_rejected_total{reason!="tired"}', "sum by (lane) (datapipe_database_up)",
        "max by (lane) (sum(datapipe_waiting_events))", "sum(up", "1 + 2",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_told(expression: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(expression)


async def test_a_service_shows_just_these(
    database: str, make_service: Callable[..., Service], postgres: Postgres
) -> None:
    """But the requests to a mirror, which a journal has none of."""
    keys = [{"name": "ios", "key": "secret"}]
    service = await make_service(database_url=database, ingest_keys=keys).start()
    login = {"Authorization": "Bearer secret"}
    install = {"event_name": "install", "user_id": 1, "timestamp": 1}
    await service.post(install, headers=login)
    await service.drained()
    postgres.execute(database, "ALTER TABLE install ADD CHECK (user_id < 2)")
    await service.post({**install, "user_id": 2}, headers=login)

    async def shown() -> bool:
        async with service.session.get(f"{service.url}/metrics") as response:
            found = labels(await response.text())
        return found | {"datapipe_mirror_requests_total": {"call"}} == exposed()

    await until(shown, what="every metric")


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(a, b) for a in range(x, x + w) for b in range(y, y + h)}
        assert x + w <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboard_shows_every_metric() -> None:
    shown = " ".join(dashboard())
    assert sorted(name for name in families() if name not in shown) == []
