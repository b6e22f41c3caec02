"""SQLite's dialect.

Times are text in UTC, such as `2026-11-25 12:00:00.123456`: SQLite has no type for them, and such
text is in order, and is what its functions read.
"""

from __future__ import annotations

import json

from datapipe.events.types import Column
from datapipe.sinks.dialect import Dialect

_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"  # of this machine, in milliseconds

_TYPES = {
    # NUMERIC would lose digits. JSON is as it was sent; that it is JSON was checked at ingest
    **dict.fromkeys(("text", "timestamptz", "date", "numeric", "uuid", "jsonb"), "TEXT"),
    "bigint": "INTEGER",
    "double precision": "REAL",
    "boolean": "INTEGER",
    "key": "TEXT NOT NULL PRIMARY KEY",
    "id": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "word": "TEXT",
    "count": "INTEGER NOT NULL DEFAULT 0",
    "event": "TEXT NOT NULL",
    "json": "TEXT NOT NULL",
    "time": "TEXT",
    "moment": f"TEXT NOT NULL DEFAULT ({_NOW})",
    "flag": "INTEGER NOT NULL DEFAULT 0",
}


def _default(column: Column) -> str:
    text = column.default or ""
    if column.type == "boolean":
        return str(int(text == "True"))
    if column.type in ("bigint", "double precision"):
        return text
    return "'" + text.replace("'", "''") + "'"


DIALECT = Dialect(
    types=_TYPES,
    default=_default,
    listed=json.dumps,
    one_of="IN (SELECT value FROM json_each(%s))",
    now=_NOW,
    clock=_NOW,
    at="strftime('%Y-%m-%d %H:%M:%f', {}, 'unixepoch')",
    epoch="round((julianday({}) - 2440587.5) * 86400.0, 3)",
    unless_there="ON CONFLICT ({}) DO NOTHING",
    options=" STRICT",
)


def marked(sql: str) -> str:
    """A statement with SQLite's mark for parameters."""
    return sql.replace("%s", "?").replace("%%", "%")
