"""PostgreSQL's dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from datapipe.events.rows import with_offset
from datapipe.events.types import PG_TYPES, Column
from datapipe.sinks import Table
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

# In the comment of a table whose partitions we make, and whose old rows we remove.
MARK = "kept by datapipe"


class PostgresDialect(Dialect):
    """PostgreSQL's: tables of event types bear our mark, and may be partitioned."""

    __slots__ = ()

    def create(self, table: Table) -> list[str]:
        """See `Dialect.create`."""
        made, *more = super().create(table)
        if table.is_own:
            return [made, *more]
        if table.partition:
            made += " PARTITION BY RANGE (received_at)"
        elif table.retention_s:
            more.append(self.index(table))
        return [made, *more, self.comment(self.table(table.name), MARK)]

    def index(self, table: Table, *, concurrently: bool = False) -> str:
        """What makes the index by which old rows are found.

        The server names it: a table that was renamed has kept the name of its own.
        """
        how = " CONCURRENTLY" if concurrently else ""
        return f"CREATE INDEX{how} ON {self.table(table.name)} (received_at)"

    def comment(self, table: str, text: str) -> str:
        """Args: table: quoted."""
        literal = text.replace("'", "''")
        return f"COMMENT ON TABLE {table} IS '{literal}'"


def dialect(schema: str) -> PostgresDialect:
    return PostgresDialect(
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
