"""The dialect of MariaDB and MySQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datapipe.events.types import Column
from datapipe.sinks.dialect import Dialect

# JSON is LONGTEXT with a CHECK on MariaDB. A UUID is text: MariaDB's type refuses a quarter of
# random ones (10.11.5 and newer). TIMESTAMP would end in 2038.
_TYPES = {
    "bigint": "BIGINT",
    "double precision": "DOUBLE",
    "text": "LONGTEXT",
    "boolean": "TINYINT(1)",
    "timestamptz": "DATETIME(6)",
    "date": "DATE",
    "numeric": "DECIMAL(65,30)",
    "uuid": "CHAR(36)",
    "jsonb": "JSON",
    "key": "VARCHAR(191) PRIMARY KEY",
    "id": "BIGINT AUTO_INCREMENT PRIMARY KEY",
    "word": "VARCHAR(255)",
    "count": "BIGINT NOT NULL DEFAULT 0",
    "event": "LONGTEXT NOT NULL",  # not JSON, which MySQL rewrites, and which has a limit of depth
    "json": "LONGTEXT NOT NULL",
    "time": "DATETIME(6)",
    "moment": "DATETIME(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6)",
    "flag": "TINYINT(1) NOT NULL DEFAULT 0",
}


def dialect() -> Dialect:
    return Dialect(
        types=_TYPES,
        default=_default,
        listed=as_list,
        one_of="IN %s",
        now="NOW(6)",
        clock="SYSDATE(6)",
        at="(TIMESTAMP'1970-01-01 00:00:00' + INTERVAL ({}) SECOND)",
        epoch="(TIMESTAMPDIFF(MICROSECOND, TIMESTAMP'1970-01-01 00:00:00', {}) / 1e6)",
        unless_there="ON DUPLICATE KEY UPDATE {0} = {0}",
        for_update=" FOR UPDATE",
        skip_locked=" FOR UPDATE SKIP LOCKED",
        quotes="`",
        options=" ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin",
    )


def _default(column: Column) -> str:
    """An expression: MySQL takes no literal as the default of a text."""
    text = column.default or ""
    if column.type == "boolean":
        return str(int(text.lower() == "true"))
    literal = text.replace("\\", "\\\\").replace("'", "''")
    return f"('{literal}')"


def as_list(values: Sequence[Any]) -> list[Any]:
    """The driver makes (1, 2, 3) of it; SQL has no list without values."""
    return list(values) or [None]
