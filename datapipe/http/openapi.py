"""`GET /openapi.json`: `templates/openapi.json`, and what is made from the event classes."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from datapipe.events.registry import Registry
from datapipe.events.types import NAME, EventType
from datapipe.events.unknown import UNKNOWN
from datapipe.http.assets import templates_folder
from datapipe.version import __version__

Schema = dict[str, Any]

# of each type: its schema, and an example
_TYPES: dict[type, tuple[Schema, Any]] = {
    int: ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, 888),
    float: ({"type": "number"}, 0.5),
    str: ({"type": "string", "pattern": "^[^\\u0000]*$"}, "have_fun"),
    bool: ({"type": "boolean"}, True),
    datetime: ({"type": "string", "format": "date-time"}, "2026-11-22T12:00:00Z"),
    date: ({"type": "string", "format": "date"}, "2026-11-22"),
    Decimal: ({"type": ["number", "string"]}, "19.99"),
    UUID: ({"type": "string", "format": "uuid"}, "7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f"),
    dict: ({"type": "object"}, {"plan": "free"}),
    list: ({"type": "array", "items": {}}, [1, 2]),
    type(None): ({"type": "null"}, None),
}


def example(kind: EventType) -> Schema:
    """An event of this type that is accepted."""
    return {"event_name": kind.name} | {f.name: _value(f.hint)[1] for f in kind.fields}


def _value(hint: Any) -> tuple[Schema, Any]:
    """Of an annotation: its schema, and an example."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [_value(arg) for arg in args]
        return {"anyOf": [schema for schema, _ in options]}, options[0][1]
    if origin is list and args:
        schema, item = _value(args[0])
        return {"type": "array", "items": schema}, [item]
    if origin is dict and args:
        schema, item = _value(args[1])
        return {"type": "object", "additionalProperties": schema}, {"plan": item}
    known: tuple[Schema, Any] = _TYPES.get(origin or hint, ({}, "anything"))
    return known


def _event_schema(kind: EventType) -> Schema:
    properties: Schema = {"event_name": {"type": "string", "const": kind.name}}
    for field in kind.fields:
        schema = dict(_value(field.hint)[0])
        if field.nullable:
            schema = {"anyOf": [schema, {"type": "null"}]}
        if field.default is not msgspec.NODEFAULT:
            schema["default"] = msgspec.to_builtins(field.default)
        properties[field.name] = schema
    required = [f.name for f in kind.fields if f.default is msgspec.NODEFAULT]
    return {
        "type": "object",
        "properties": properties,
        "required": ["event_name", *required],
        "examples": [example(kind)],
    }


def _unknown_schema(registered: Sequence[str]) -> Schema:
    """Of an event whose type is not registered, where such are kept."""
    name = {"pattern": f"^{NAME.pattern}$", "not": {"enum": list(registered)}}
    properties = {"event_name": {"type": "string", **name}}
    return {"type": "object", "properties": properties, "required": ["event_name"]}


def _union(names: Sequence[str], keeps_unknown: bool) -> Schema:
    """Any event; which type it is of, its `event_name` says."""
    refs = {name: f"#/components/schemas/{name}" for name in names}
    known: Schema = {
        "oneOf": [{"$ref": ref} for ref in refs.values()],
        "discriminator": {"propertyName": "event_name", "mapping": refs},
    }
    if not keeps_unknown:
        return {"Event": known}
    # a discriminator has no place for names that it does not map
    of = [{"$ref": f"#/components/schemas/{name}"} for name in ("RegisteredEvent", UNKNOWN)]
    return {"RegisteredEvent": known, "Event": {"oneOf": of}}


def _request_examples(examples: Sequence[Schema]) -> dict[str, Schema]:
    """By content type."""
    lines = "".join([msgspec.json.encode(each).decode() + "\n" for each in examples])
    return {
        "application/json": {
            "one": {"summary": "one event", "value": examples[0]},
            "several": {"summary": "several events", "value": list(examples)},
        },
        "application/x-ndjson": {"several": {"summary": "an event a line", "value": lines}},
    }


def _add_what_all_answer(operations: Sequence[Schema], shared: Mapping[str, Schema]) -> None:
    """Faults, and the header of every answer."""
    header = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
    for operation in operations:
        responses = operation["responses"]
        for status, name in (("400", "Malformed"), ("500", "Fault")):
            responses.setdefault(status, {"$ref": f"#/components/responses/{name}"})
        operation["responses"] = dict(sorted(responses.items()))
    own = [each for op in operations for each in op["responses"].values() if "$ref" not in each]
    for response in (*own, *shared.values()):
        response["headers"] = header | response.get("headers", {})


def document(registry: Registry) -> Schema:
    """The whole description."""
    whole: Schema = msgspec.json.decode((templates_folder() / "openapi.json").read_bytes())
    whole["info"]["version"] = __version__
    paths, schemas = whole["paths"], whole["components"]["schemas"]
    kinds = sorted(registry.types.items())
    names = [name for name, _ in kinds]
    schemas |= {name: _event_schema(kind) for name, kind in kinds}
    if registry.keeps_unknown:
        schemas[UNKNOWN] = _unknown_schema(names)
    schemas |= _union(names, registry.keeps_unknown)
    schemas["Lane"] = {"type": "string", "examples": names}
    post = paths["/"]["post"]
    examples = _request_examples([example(kind) for _, kind in kinds[:2]])
    for content, media in post["requestBody"]["content"].items():
        media["examples"] = examples[content]
    operations = [operation for path in paths.values() for operation in path.values()]
    _add_what_all_answer(operations, whole["components"]["responses"])
    paths["/v1/events"] = {"post": post | {"operationId": "postEventsV1"}}
    return whole
