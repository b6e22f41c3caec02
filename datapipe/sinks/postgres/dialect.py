"""PostgreSQL's dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from datapipe.events.types import PG_TYPES, Column, with_offset
from datapipe.sinks.dialect import Dialect

_TYPES = {
    **{name: name for name in PG_TYPES.values()},
    "key": "text PRIMARY KEY",
    "id": "bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "word": "text",
    "count": "bigint NOT NULL DEFAULT 0",
    "event": "jsonb NOT NULL",
    "json": "json NOT NULL",
    "time": "timestamptz",
    "moment": "timestamptz NOT NULL DEFAULT now()",
    "flag": "boolean NOT NULL DEFAULT false",
}


def dialect(schema: str) -> Dialect:
    return Dialect(
        types=_TYPES,
        default=_default,
        listed=as_json,
        # Thousands of values go as one: psycopg2 quotes those of a list one by one, and holds the
        # interpreter lock until it has done all of them.
        one_of="= ANY(ARRAY(SELECT json_array_elements_text(%s)::{}))",
        now="now()",
        clock="clock_timestamp()",
        at="to_timestamp({})",
        epoch="extract(epoch FROM {})::float8",
        unless_there="ON CONFLICT DO NOTHING",
        for_update=" FOR UPDATE",
        skip_locked=" FOR UPDATE SKIP LOCKED",
        event="event #>> '{}'",
        unknown_event="event::text",
        schema=schema,
    )


def as_json(values: Sequence[Any] | Mapping[str, Any]) -> str:
    """What `json_array_elements` and `json_each_text` take."""
    return msgspec.json.encode(values).decode()


def _default(column: Column) -> str:
    text = column.default or ""
    if column.type == "timestamptz":
        text = with_offset(text)
    literal = text.replace("'", "''")
    return f"'{literal}'::{column.type}"
