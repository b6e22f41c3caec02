"""`templates/openapi.json` says the same as the code."""

from __future__ import annotations

import json

from datapipe.events.registry import load_registry
from datapipe.http.openapi import document
from datapipe.monitor.metrics import REASONS
from datapipe.settings import Settings


def test_the_reasons_of_a_refusal() -> None:
    schemas = document(load_registry(Settings()))["components"]["schemas"]
    assert schemas["Reason"] == {"type": "string", "enum": list(REASONS)}


def test_what_lists_and_dicts_hold() -> None:
    fields = {"tags": "list[str | None]", "prices": "dict[str, list[float]]?", "rest": "dict"}
    registry = load_registry(Settings(events={"basket": fields}))
    basket = document(registry)["components"]["schemas"]["basket"]
    tags, prices, rest = (basket["properties"][name] for name in fields)
    assert tags["type"] == "array"
    assert [each["type"] for each in tags["items"]["anyOf"]] == ["string", "null"]
    numbers = {"type": "array", "items": {"type": "number"}}
    assert prices["anyOf"] == [
        {"type": "object", "additionalProperties": numbers}, {"type": "null"},
    ]  # fmt: skip
    assert rest == {"type": "object"}
    (example,) = basket["examples"]
    assert registry.types["basket"].look_closer(json.dumps(example).encode(), "2026-01-01 00:00:00")


def test_where_unknown_types_are_kept_any_name_but_theirs_is_good() -> None:
    settings = Settings(unknown_events="keep")
    schemas = document(load_registry(settings))["components"]["schemas"]
    kept = schemas["datapipe_unknown"]["properties"]["event_name"]
    assert kept["not"] == {"enum": ["crash_report", "install", "purchase"]}
    assert {"$ref": "#/components/schemas/datapipe_unknown"} in schemas["Event"]["oneOf"]
    assert "datapipe_unknown" not in schemas["RegisteredEvent"]["discriminator"]["mapping"]
    assert "datapipe_unknown" not in document(load_registry(Settings()))["components"]["schemas"]


def test_the_name_of_an_event_says_which_type_it_is_of() -> None:
    schemas = document(load_registry(Settings()))["components"]["schemas"]
    refs = {n: f"#/components/schemas/{n}" for n in ("crash_report", "install", "purchase")}
    told = {"propertyName": "event_name", "mapping": refs}
    assert schemas["Event"]["discriminator"] == told
    assert [each["$ref"] for each in schemas["Event"]["oneOf"]] == list(refs.values())
    for name in refs:
        named = {"type": "string", "const": name}
        assert schemas[name]["properties"]["event_name"] == named


def test_each_answer_has_a_request_id_and_an_example() -> None:
    whole = document(load_registry(Settings()))
    shared = whole["components"]["responses"]
    operations = [each for path in whole["paths"].values() for each in path.values()]
    assert len({each["operationId"] for each in operations}) == len(operations) > 15
    for operation in operations:
        assert {"200", "400", "500"} <= operation["responses"].keys()
        for response in operation["responses"].values():
            told = shared[response["$ref"].split("/")[-1]] if "$ref" in response else response
            assert "X-Request-ID" in told["headers"]
            for media in told.get("content", {}).values():
                assert "example" in media or media["examples"]
