"""`GET /openapi.json`: OpenAPI 3.1, made from the event classes."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from datapipe.events import EventType
from datapipe.registry import Registry
from datapipe.version import __version__

_SCHEMAS: dict[type, dict[str, Any]] = {
    int: {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    float: {"type": "number"},
    str: {"type": "string", "pattern": "^[^\\u0000]*$"},
    bool: {"type": "boolean"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
    Decimal: {"type": ["number", "string"]},
    UUID: {"type": "string", "format": "uuid"},
    dict: {"type": "object"},
    list: {"type": "array"},
}
_EXAMPLES: dict[type, Any] = {
    int: 888,
    float: 0.5,
    str: "have_fun",
    bool: True,
    datetime: "2026-11-22T12:00:00Z",
    date: "2026-11-22",
    Decimal: "19.99",
    UUID: "7f8e7a52-32f3-4f9f-9a53-1f1f1f1f1f1f",
    dict: {"plan": "free"},
    list: [1, 2],
}


def example(kind: EventType) -> dict[str, Any]:
    """An event of this type that is accepted."""
    return {"event_name": kind.name} | {f.name: _EXAMPLES[f.kind] for f in kind.fields}


def _event_schema(kind: EventType) -> dict[str, Any]:
    properties: dict[str, Any] = {"event_name": {"const": kind.name}}
    for field in kind.fields:
        schema = dict(_SCHEMAS[field.kind])
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


def _answer(text: str, schema: str = "Answer") -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


def _json(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}


def _text(text: str, kind: str) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": {"type": "string"}}}}


_DENIED = {"401": _answer("no or wrong admin key"), "403": _answer("not from here")}


def document(registry: Registry) -> dict[str, Any]:
    """The whole description."""
    events = {name: _event_schema(kind) for name, kind in sorted(registry.types.items())}
    one_of = {"oneOf": [{"$ref": f"#/components/schemas/{name}"} for name in events]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "datapipe", "version": __version__},
        "paths": _paths(one_of),
        "components": {
            "schemas": {**events, **_ANSWER_SCHEMAS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
        },
    }


_ANSWER_SCHEMAS: dict[str, Any] = {
    "Answer": {
        "type": "object",
        "properties": {
            "status_code": {"type": "integer"},
            "status_message": {"type": "string"},
            "accepted": {"type": "integer"},
            "rejected": {"type": "integer"},
            "busy": {"type": "array", "items": {"type": "string"}},
            "errors": {
                "type": "array",
                "maxItems": 100,
                "items": {
                    "type": "object",
                    "properties": {
                        "index": {"type": "integer"},
                        "status_code": {"type": "integer"},
                        "status_message": {"type": "string"},
                    },
                    "required": ["index", "status_code", "status_message"],
                },
            },
        },
        "required": ["status_code", "status_message"],
    }
}


def _paths(event: dict[str, Any]) -> dict[str, Any]:
    take = {
        "summary": "Take events: one object, an array, or NDJSON",
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"anyOf": [event, {"type": "array", "items": event}]}
                },
                "application/x-ndjson": {"schema": {"type": "string"}},
            },
        },
        "responses": {
            "200": _answer("all accepted, durable"),
            "207": _answer("a batch of which some were accepted"),
            "400": _answer("not JSON, a key missing, a wrong value, an unknown event type"),
            "401": _answer("no or wrong ingest key"),
            "408": _answer("not complete in time"),
            "413": _answer("too long, or too many events"),
            "415": _answer("a Content-Encoding that is not known"),
            "500": _answer("a fault of ours"),
            "503": _answer("no room, or shutting down: see Retry-After"),
        },
    }
    lane = {"name": "lane", "in": "query", "schema": {"type": "string"}}
    accept = {"name": "accept", "in": "query", "schema": {"enum": ["dead"]}}
    load = {
        "summary": "Load now; answers after one try per lane",
        "parameters": [lane, accept],
        "responses": {"200": _json("rows loaded, and what failed"), **_DENIED,
                      "400": _answer("a wrong parameter"), "404": _answer("no such lane")},
    }  # fmt: skip

    def look(text: str, answer: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"get": {"summary": text, "responses": {"200": answer, **more}}}

    denied = {"401": _DENIED["401"]}
    return {
        "/": {
            **look("The status page", _text("the page", "text/html"), **denied),
            "post": take,
        },
        "/load": {"post": load},
        "/status.json": look("What the page shows", _json("the numbers"), **denied),
        "/metrics": look("Prometheus", _text("metrics", "text/plain"), **denied),
        "/healthz": look("Is the process alive?", _answer("it is")),
        "/readyz": look(
            "Would it accept an event now?", _answer("yes"), **{"503": _answer("no, and why")}
        ),
        "/openapi.json": look("This description", _json("OpenAPI 3.1")),
    }
