"""`GET /openapi.json`: OpenAPI 3.1, made from the event classes."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from datapipe.assets import FILES
from datapipe.events import EventType
from datapipe.openapi_answers import ANYTHING, SCHEMAS, Schema, ref
from datapipe.registry import Registry
from datapipe.version import __version__

_SCHEMAS: dict[type, Schema] = {
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


def example(kind: EventType) -> Schema:
    """An event of this type that is accepted."""
    return {"event_name": kind.name} | {f.name: _EXAMPLES[f.kind] for f in kind.fields}


def _event_schema(kind: EventType) -> Schema:
    properties: Schema = {"event_name": {"const": kind.name}}
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


def document(registry: Registry) -> Schema:
    """The whole description."""
    events = {name: _event_schema(kind) for name, kind in sorted(registry.types.items())}
    one_of = {"oneOf": [ref(name) for name in events]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "datapipe", "version": __version__},
        "paths": _paths(one_of, sorted(registry.types)),
        "components": {
            "schemas": {**events, **SCHEMAS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
                "query": {"type": "apiKey", "in": "query", "name": "key"},
            },
        },
    }


def _json(text: str, schema: Schema) -> Schema:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _answer(text: str) -> Schema:
    return _json(text, ref("Answer"))


def _text(text: str, kind: str) -> Schema:
    return {"description": text, "content": {kind: {"schema": {"type": "string"}}}}


_NO_KEY = {
    **_answer("no or wrong key"),
    "headers": {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}},
}
_LATER = {
    **_answer("not now: no room, the mirror is away, or shutting down"),
    "headers": {"Retry-After": {"required": True, "schema": {"type": "string"}}},
}
_BROKEN = _answer("the request is no good HTTP")
_STATUS = {"401": _NO_KEY, "400": _BROKEN}
_ADMIN = {**_STATUS, "403": _answer("not from here: see the message for how to get it")}
_KEYS: list[Schema] = [{}, {"bearer": []}, {"basic": []}]  # wanted only where keys are set


def _get(text: str, answer: Schema, also: Schema, security: list[Schema] | None = None) -> Schema:
    operation = {"summary": text, "responses": {"200": answer, **also}}
    return {"get": operation | ({"security": security} if security else {})}


def _paths(event: Schema, lanes: list[str]) -> Schema:
    ready = {"503": _answer("no, and why"), "400": _BROKEN}
    paths: Schema = {
        "/": _get("The status page", _text("the page", "text/html"), _STATUS, _KEYS),
        "/stream": _get(
            "What the page shows, as server-sent events, one a second",
            _text("each event is what /status.json tells; `history` only when it has a new point",
                  "text/event-stream"),
            {**_STATUS, "503": _answer("shutting down")}, _KEYS,
        ),
        "/status.json": _get(
            "What the page shows", _json("numbers", ref("Status")), _STATUS, _KEYS
        ),
        "/refused": _get(
            "The last requests that were refused", _json("newest first", ref("Refused")), _ADMIN,
            _KEYS,
        ),
        "/metrics": _get("Prometheus", _text("metrics", "text/plain"), _STATUS, _KEYS),
        "/healthz": _get("Is the process alive?", _answer("it is"), {"400": _BROKEN}),
        "/readyz": _get("Would it accept an event now?", _answer("yes"), ready),
        "/openapi.json": _get("This description", _json("OpenAPI 3.1", ANYTHING), {"400": _BROKEN}),
        "/load": {"post": _load(lanes)},
        "/dead": {"get": _dead_letters(lanes)},
        "/dead/replay": {"post": _change("Put dead letters back into their tables", "Replayed")},
        "/dead/drop": {"post": _change("Remove dead letters for good", "Dropped")},
    }  # fmt: skip
    for name, kind in FILES.items():
        paths[f"/{name}"] = _get("A part of the page", _text("the file", kind), {"400": _BROKEN})
    paths["/"]["post"] = _take(event)
    return paths


def _load(lanes: list[str]) -> Schema:
    return {
        "summary": "Load now; answers after one try per lane",
        "security": _KEYS,
        "parameters": [
            {"name": "lane", "in": "query", "schema": {"type": "string", "examples": lanes}},
            {
                "name": "accept",
                "in": "query",
                "description": "`dead` lets refused rows of a blocked lane through",
                "schema": {"enum": ["dead"]},
            },
        ],
        "responses": {
            "200": _json("rows loaded, and what failed, by lane", ref("Loaded")),
            "303": {"description": "the same for a form: back to the page"},
            **_ADMIN,
            "400": _answer("a wrong parameter"),
            "404": _answer("no such lane"),
        },
    }


def _dead_letters(lanes: list[str]) -> Schema:
    def query(name: str, schema: Schema) -> Schema:
        return {"name": name, "in": "query", "schema": schema}

    limit = {"type": "integer", "minimum": 0, "maximum": 1000, "default": 100}
    return {
        "summary": "Events that were accepted and that the database refuses",
        "security": _KEYS,
        "parameters": [
            query("lane", {"type": "string", "examples": lanes}),
            query("sqlstate", {"type": "string"}),
            query("limit", limit),
        ],
        "responses": {
            "200": _json("how many there are, and the newest", ref("Letters")),
            **_ADMIN,
            "503": _answer("the database does not answer"),
        },
    }


def _change(text: str, answer: str) -> Schema:
    return {
        "summary": text,
        "security": _KEYS,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref("Which")}},
        },
        "responses": {
            "200": _json("how many", ref(answer)),
            **_ADMIN,
            "413": _answer("the body is too long"),
            "503": _answer("the database does not answer"),
        },
    }


def _take(event: Schema) -> Schema:
    return {
        "summary": "Take events: one object, an array, or NDJSON",
        "security": [*_KEYS, {"query": []}],
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
                    "schema": {"anyOf": [event, {"type": "array", "items": event, "minItems": 1}]}
                },
                "application/x-ndjson": {"schema": {"type": "string"}},
            },
        },
        "responses": {
            "200": _answer("all accepted, durable"),
            "207": _answer("a batch of which some were accepted"),
            "400": _answer("not JSON, a key missing, a wrong value, an unknown event type"),
            "401": _NO_KEY,
            "408": _answer("not complete in time"),
            "413": _answer("too long, or too many events"),
            "415": _answer("a Content-Encoding that is not known"),
            "500": _answer("a fault of ours"),
            "503": _LATER,
        },
    }
