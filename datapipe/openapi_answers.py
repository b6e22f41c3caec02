"""What the paths answer, as JSON Schema: the part of `/openapi.json` that no event class makes."""

from __future__ import annotations

from typing import Any

from datapipe.metrics import REASONS

Schema = dict[str, Any]

COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "number", "minimum": 0, "description": "seconds"}
NUMBER: Schema = {"type": "number"}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "string", "format": "date-time"}
ANYTHING: Schema = {"type": "object"}


def record(**keys: Schema) -> Schema:
    """An object with all of these keys; more may follow in later releases."""
    return {"type": "object", "properties": keys, "required": list(keys)}


def each(of: Schema) -> Schema:
    """An object with any names, such as those of lanes."""
    return {"type": "object", "additionalProperties": of}


def many(of: Schema, most: int | None = None) -> Schema:
    return {"type": "array", "items": of} | ({} if most is None else {"maxItems": most})


def maybe(of: Schema) -> Schema:
    return {"anyOf": [of, {"type": "null"}]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_ERROR = record(index=COUNT, status_code=COUNT, status_message=TEXT)
ANSWER: Schema = {
    "type": "object",
    "properties": {
        "status_code": COUNT,
        "status_message": TEXT,
        "accepted": COUNT,
        "rejected": COUNT,
        "busy": many(TEXT),
        "errors": many(_ERROR, 100),
    },
    "required": ["status_code", "status_message"],
}

_BOOKS = dict.fromkeys(
    ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting"), COUNT
)  # in events
_LANE = record(
    **_BOOKS,
    replayed=COUNT,
    balanced=FLAG,
    in_memory=COUNT,
    parked=COUNT,
    waiting_bytes=COUNT,
    oldest_seconds=SECONDS,
    accepted_per_second=NUMBER,
    loaded_per_second=NUMBER,
    state={"enum": ["empty", "waiting", "loading", "retrying", "blocked"]},
    full=FLAG,
    blocked=maybe(TEXT),
    error=maybe(TEXT),
    last_load=maybe(record(at=TIME, rows=COUNT, seconds=SECONDS)),
    next_load_seconds=maybe(SECONDS),
)
_SUMMARY = record(
    state={
        "enum": [
            "healthy", "starting", "refusing", "database_down", "unbalanced", "lane_blocked",
            "lane_failing", "nearly_full",
        ]
    },
    text=TEXT,
    since=maybe(TIME),
    also=many(TEXT),
)  # fmt: skip
_MIRROR = record(
    kind={"enum": ["journal", "ironmq", "none"]},
    up=FLAG,
    error=maybe(TEXT),
    bytes=COUNT,
    max_bytes=COUNT,
    used=NUMBER,
    seconds_left=maybe(COUNT),
    append_seconds=maybe(SECONDS),
    requests=COUNT,
    calls=each(COUNT),
    requests_this_month=COUNT,
    expires_seconds=maybe(SECONDS),
)
_SERIES = record(accepted=many(NUMBER), loaded=many(NUMBER), waiting=many(NUMBER))
STATUS = record(
    version=TEXT,
    now=TIME,
    started_at=TIME,
    uptime_seconds=SECONDS,
    ready=FLAG,
    processes=COUNT,
    summary=_SUMMARY,
    totals=record(
        waiting_bytes=NUMBER, in_memory=NUMBER, parked=NUMBER, accepted_per_second=NUMBER,
        loaded_per_second=NUMBER, oldest_seconds=SECONDS,
    ),
    books=record(**_BOOKS, balanced=FLAG),
    lanes=each(_LANE),
    rejected={"type": "object", "properties": dict.fromkeys(REASONS, COUNT)},
    mirror=_MIRROR,
    database=record(
        up=FLAG, error=maybe(TEXT), version=maybe(TEXT), schema=TEXT, answer_seconds=maybe(SECONDS)
    ),
    recent_loads=many(
        record(
            at=TIME, lane=TEXT, rows=COUNT, duplicates=COUNT, dead=COUNT, seconds=SECONDS,
            tries=COUNT, error=maybe(TEXT),
        )
    ),
    history=record(step_seconds=NUMBER, points=COUNT, lanes=each(_SERIES), total=_SERIES),
)  # fmt: skip
REFUSED = record(
    refused=many(
        record(
            at=TIME, reason={"enum": list(REASONS)}, status_code=COUNT, message=TEXT,
            request_id=TEXT, events=COUNT, body=TEXT,
        )
    )
)  # fmt: skip
LETTERS = record(
    total=COUNT,
    groups=many(record(lane=TEXT, sqlstate=TEXT, message=TEXT, count=COUNT)),
    letters=many(
        record(
            id=COUNT, lane=TEXT, event=ANYTHING, sqlstate=TEXT, message=TEXT,
            column_name=maybe(TEXT), created_at=TIME,
        ),
        1000,
    ),
)  # fmt: skip
WHICH: Schema = {
    "oneOf": [
        record(ids=many({"type": "integer"})) | {"additionalProperties": False},
        record(all={"const": True}) | {"additionalProperties": False},
        {
            "type": "object",
            "properties": {"lane": TEXT, "sqlstate": TEXT},
            "minProperties": 1,
            "additionalProperties": False,
        },
    ]
}
LOADED = record(loaded=each(COUNT), failed=each(TEXT))
SCHEMAS: Schema = {
    "Answer": ANSWER,
    "Status": STATUS,
    "Refused": REFUSED,
    "Loaded": LOADED,
    "Letters": LETTERS,
    "Which": WHICH,
    "Replayed": record(replayed=each(COUNT), dead=COUNT),
    "Dropped": record(dropped=COUNT),
}
