"""Dialect: in what the SQL of databases differs; and our own tables, in words that each maps.

Statements mark their parameters with `%s`; a sink whose driver wants another mark replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datapipe.events.types import Column
from datapipe.events.unknown import UNKNOWN
from datapipe.sinks import Selection, Shelf, Table

OWN_TABLES = (
    Table(
        "datapipe_ledger",
        (
            Column("segment", "key"),  # or a claim, a part, a cluster
            Column("kind", "word"),
            Column("lane", "word"),
            Column("events", "count"),  # of a cluster: 1 once it has the mark
            Column("dead", "count"),
            Column("duplicates", "count"),
            # of a claim: the hash of what stands; of a part: what it lacks; a cluster's mark
            Column("body", "text"),
            Column("source", "word"),  # where it lies: a journal's id, `ironmq`, `nats:` and prefix
            Column("process", "word"),
            Column("load", "word"),
            Column("loaded_at", "moment"),
        ),
    ),
    Table(
        "datapipe_dead_letters",
        (
            Column("id", "id"),
            Column("lane", "word"),
            Column("event", "event"),
            Column("sqlstate", "word"),
            Column("message", "text"),
            Column("column_name", "text"),
            Column("segment", "word"),
            Column("created_at", "moment"),
        ),
    ),
    Table(
        "datapipe_processes",
        (
            Column("process", "key"),
            # a journal's id, or the process's; before it, with a colon: its group
            Column("mirror", "word"),
            Column("oldest_waiting", "time"),
            Column("started_at", "moment"),
            Column("seen_at", "moment"),
            Column("beats", "count"),
            Column("ended", "flag"),
            Column("host", "word"),
        ),
    ),
)

# The table of the lane of unknown events, made at its first load: most services have none.
UNKNOWN_TABLE = Table(
    UNKNOWN,
    (
        Column("id", "id"),
        Column("event_name", "word"),
        Column("event", "json"),  # as it was sent
        Column("message", "text"),  # why a replay refused it
        Column("received_at", "moment"),
    ),
)

_INDEXES = {
    "datapipe_ledger_kind": ("datapipe_ledger", ("kind", "loaded_at")),
    "datapipe_ledger_source": ("datapipe_ledger", ("source",)),
    "datapipe_dead_letters_lane": ("datapipe_dead_letters", ("lane", "sqlstate")),
    "datapipe_unknown_event_name": (UNKNOWN, ("event_name", "id")),
    "datapipe_unknown_received_at": (UNKNOWN, ("received_at",)),
    # or each heartbeat locks the rows of all others while it looks for older ones of its mirror
    "datapipe_processes_mirror": ("datapipe_processes", ("mirror",)),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one database says what all of them can.

    Attributes:
        types: the SQL of a column, by `Column.type`, and by the words in `OWN_TABLES`: a `key` is
            the primary key, a `word` a text that may be in an index, a `count` a number that is 0
            at first, a `moment` a time that is now at first, an `id` a number that rises.
        default: the literal of a column's default, which is not None.
        listed: the one parameter of `one_of` for some values.
        one_of: that a value is one of those, whose type stands for the braces (text or bigint).
        now: the time, the same in a whole transaction or statement.
        clock: the time as it is read.
        at: the time of Unix seconds, which stand for the braces. epoch: Unix seconds of a time.
        unless_there: the end of an INSERT that passes over rows whose key is there; it waits for
            transactions that have inserted the same, and hides no other error. The key's name
            stands for the braces.
        for_update: the end of a SELECT that locks what it finds. skip_locked: the same, but for
            what others have locked.
        event: a dead letter's event as text. unknown_event: the same of an unknown event.
        quotes: the character around a name. schema: of all our tables, or empty. options: the end
            of a CREATE TABLE.
    """

    types: Mapping[str, str]
    default: Callable[[Column], str]
    listed: Callable[[Sequence[Any]], Any]
    one_of: str
    now: str
    clock: str
    at: str
    epoch: str
    unless_there: str
    for_update: str = ""
    skip_locked: str = ""
    event: str = "event"
    unknown_event: str = "event"
    quotes: str = '"'
    schema: str = ""
    options: str = ""

    def quote(self, name: str) -> str:
        """An identifier."""
        return f"{self.quotes}{name.replace(self.quotes, self.quotes * 2)}{self.quotes}"

    def table(self, name: str) -> str:
        """A table's name in a statement."""
        return f"{self.quote(self.schema)}.{self.quote(name)}" if self.schema else self.quote(name)

    def parameterized(self, name: str) -> str:
        """The same in a statement that has parameters: drivers look at each `%` of it."""
        return self.table(name).replace("%", "%%")

    def ago(self, seconds: str = "%s") -> str:
        """The time so many seconds ago."""
        return self.at.format(f"{self.epoch.format(self.now)} - {seconds}")

    def kept(self, shelf: Shelf) -> tuple[str, str, str]:
        """Expressions of a shelf's table: lane, event as text, when it was received or NULL."""
        if shelf is Shelf.UNKNOWN:
            return "event_name", self.unknown_event, "received_at"
        return "lane", self.event, "NULL"

    def where(self, selection: Selection) -> tuple[str, list[Any]]:
        """A selection of a shelf as a condition and its values."""
        ids, lanes, state = selection.ids, selection.lanes, self.quote("sqlstate")
        lane, _, _ = self.kept(selection.shelf)
        tests = {
            f"id {self.one_of.format('bigint')}": None if ids is None else self.listed(ids),
            f"{lane} = %s": selection.lane,
            f"{lane} {self.one_of.format('text')}": None if lanes is None else self.listed(lanes),
            f"{state} = %s": selection.sqlstate or None,
        }
        given = {test: value for test, value in tests.items() if value is not None}
        none = [f"coalesce({state}, '') = ''"] if selection.sqlstate == "" else []
        return " AND ".join(["1 = 1", *none, *given]), list(given.values())

    # --- tables ---

    def create(self, table: Table) -> list[str]:
        """What makes the table with all its columns, and its indexes if it is one of ours."""
        columns = ",\n".join(f"    {self._definition(column)}" for column in table.columns)
        made = f"CREATE TABLE {self.table(table.name)} (\n{columns}\n){self.options}"
        indexes = [
            f"CREATE INDEX {self.quote(name)} ON {self.table(of)}"
            f" ({', '.join(map(self.quote, columns))})"
            for name, (of, columns) in _INDEXES.items()
            if of == table.name
        ]
        return [made, *indexes]

    def add_columns(self, table: Table, missing: Iterable[Column]) -> list[str]:
        """What adds columns; existing rows get the default."""
        name = self.table(table.name)
        return [f"ALTER TABLE {name} ADD COLUMN {self._definition(each)}" for each in missing]

    def _definition(self, column: Column) -> str:
        definition = f"{self.quote(column.name)} {self.types[column.type]}"
        return definition if column.default is None else (
            f"{definition} DEFAULT {self.default(column)}"
        )  # fmt: skip

    def script(self, tables: Iterable[Table]) -> str:
        """All statements, as for an empty database."""
        statements = [each for table in (*OWN_TABLES, *tables) for each in self.create(table)]
        return "".join(f"{statement};\n\n" for statement in statements)
