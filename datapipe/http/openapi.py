"""`GET /openapi.json`: `templates/openapi.json`, and what is made from the event classes."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from datapipe.events.registry import Registry
from datapipe.events.types import NAME, EventType
from datapipe.events.unknown import UNKNOWN
from datapipe.http.assets import FILES, templates_folder
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
    list: ({"type": "array"}, [1, 2]),
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
    properties: Schema = {"event_name": {"const": kind.name}}
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


def document(registry: Registry) -> Schema:
    """The whole description."""
    whole: Schema = msgspec.json.decode((templates_folder() / "openapi.json").read_bytes())
    whole["info"]["version"] = __version__
    events = {name: _event_schema(kind) for name, kind in sorted(registry.types.items())}
    if registry.keeps_unknown:
        events[UNKNOWN] = _unknown_schema(list(events))
    whole["paths"]["/v1/events"] = {"post": whole["paths"]["/"]["post"]}
    whole["components"]["schemas"] |= events | {
        "Event": {"oneOf": [{"$ref": f"#/components/schemas/{name}"} for name in events]},
        "Lane": {"type": "string", "examples": list(events)},
    }
    for name, kind in FILES.items():
        text = {"description": "the file", "content": {kind: {"schema": {"type": "string"}}}}
        answers = {"200": text, "400": {"$ref": "#/components/responses/Broken"}}
        operation = {"summary": "A part of the page", "responses": answers}
        whole["paths"][f"/{name}"] = {"get": operation}
    return whole
