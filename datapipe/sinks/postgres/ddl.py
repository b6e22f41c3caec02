"""The DDL: our own tables and the lanes', made when missing, never dropped or retyped."""

from __future__ import annotations

from collections.abc import Iterable

from datapipe.events.types import Column, with_offset
from datapipe.sinks import Table

# One key for all DDL of datapipe in a database: processes that start at once make a table one
# after the other, which IF NOT EXISTS alone does not give.
DDL_LOCK = 0x64617461_70697065  # "datapipe"

OWN_TABLES = (
    Table(
        "datapipe_ledger",
        (
            Column("segment", "text PRIMARY KEY"),  # or a claim, a part, a cluster
            Column("kind", "text NOT NULL"),
            Column("lane", "text"),
            Column("events", "bigint DEFAULT 0"),  # of a cluster: 1 once it has the mark
            Column("dead", "bigint DEFAULT 0"),
            Column("duplicates", "bigint DEFAULT 0"),
            Column("body", "text"),  # of a claim: the hash of what stands; a cluster's mark
            Column("source", "text"),  # where it lies: a journal's id, `ironmq`, `nats:` and prefix
            Column("process", "text"),
            Column("load", "text"),
            Column("loaded_at", "timestamptz NOT NULL DEFAULT now()"),
        ),
    ),
    Table(
        "datapipe_dead_letters",
        (
            Column("id", "bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY"),
            Column("lane", "text NOT NULL"),
            Column("event", "jsonb NOT NULL"),
            Column("sqlstate", "text"),
            Column("message", "text"),
            Column("column_name", "text"),
            Column("segment", "text"),
            Column("created_at", "timestamptz NOT NULL DEFAULT now()"),
        ),
    ),
    Table(
        "datapipe_processes",
        (
            Column("process", "text PRIMARY KEY"),
            Column(
                "mirror", "text"
            ),  # a journal's id, or the process's; before it, with a colon: its group
            Column("oldest_waiting", "timestamptz"),
            Column("started_at", "timestamptz NOT NULL DEFAULT now()"),
            Column("seen_at", "timestamptz NOT NULL DEFAULT now()"),
            Column("beats", "bigint NOT NULL DEFAULT 0"),
            Column("ended", "boolean NOT NULL DEFAULT false"),
            Column("host", "text"),
        ),
    ),
)

OWN_INDEXES = {
    "datapipe_ledger_kind": ("datapipe_ledger", "(kind, loaded_at)"),
    "datapipe_ledger_source": ("datapipe_ledger", "(source)"),
    "datapipe_dead_letters_lane": ("datapipe_dead_letters", "(lane, sqlstate)"),
}


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def qualified(schema: str, table: str) -> str:
    """The table's name in a statement."""
    return f"{quote(schema)}.{quote(table)}"


def parameterized(schema: str, table: str) -> str:
    """The same in a statement that has parameters: psycopg2 looks at each `%` of it."""
    return qualified(schema, table).replace("%", "%%")


def create_table(schema: str, table: Table) -> str:
    """One statement that makes the table with all its columns."""
    columns = ",\n".join(f"    {_definition(column)}" for column in table.columns)
    return f"CREATE TABLE {qualified(schema, table.name)} (\n{columns}\n)"


def add_columns(schema: str, table: Table, missing: Iterable[Column]) -> str:
    """One statement that adds columns; existing rows get the default."""
    added = ", ".join(f"ADD COLUMN {_definition(column)}" for column in missing)
    return f"ALTER TABLE {qualified(schema, table.name)} {added}"


def create_indexes(schema: str, table: Table) -> list[str]:
    """The indexes of one of our own tables."""
    return [
        f"CREATE INDEX {quote(name)} ON {qualified(schema, of)} {columns}"
        for name, (of, columns) in OWN_INDEXES.items()
        if of == table.name
    ]


def _definition(column: Column) -> str:
    definition = f"{quote(column.name)} {column.type}"
    if column.default is None:
        return definition
    text = with_offset(column.default) if column.type == "timestamptz" else column.default
    literal = text.replace("'", "''")
    return f"{definition} DEFAULT '{literal}'::{column.type}"


def ddl(schema: str, tables: Iterable[Table]) -> str:
    """What `datapipe schema` prints: everything, as for an empty schema."""
    statements: list[str] = []
    for table in (*OWN_TABLES, *tables):
        statements += [create_table(schema, table), *create_indexes(schema, table)]
    return "".join(f"{statement};\n\n" for statement in statements)
