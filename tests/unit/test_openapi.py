"""`templates/openapi.json` says the same as the code."""

from __future__ import annotations

from datapipe.events.registry import load_registry
from datapipe.http.openapi import document
from datapipe.monitor.metrics import REASONS
from datapipe.settings import Settings


def test_the_reasons_of_a_refusal() -> None:
    schemas = document(load_registry(Settings()))["components"]["schemas"]
    assert schemas["Reason"] == {"enum": list(REASONS)}
