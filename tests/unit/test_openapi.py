"""`templates/openapi.json` says the same as the code."""

from __future__ import annotations

from datapipe.metrics import REASONS
from datapipe.openapi import document
from datapipe.registry import load_registry
from datapipe.settings import Settings


def test_the_reasons_of_a_refusal() -> None:
    schemas = document(load_registry(Settings()))["components"]["schemas"]
    assert schemas["Reason"] == {"enum": list(REASONS)}
