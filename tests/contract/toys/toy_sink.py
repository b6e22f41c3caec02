"""A toy sink, as a third party would write one: rows, ledger and all else in one SQLite file."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.events.rows import with_offset
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import (
    UNKNOWN_GROUPS,
    Beat,
    Heartbeat,
    Mark,
    Selection,
    Shelf,
    SinkPlugin,
    Table,
)
from datapipe.sinks.letters import event_json, found, found_unknown
from datapipe.sinks.transaction import (
    Entry,
    Kept,
    Known,
    Letter,
    RefusedRow,
    Rows,
    TableMissing,
    Transaction,
)
from datapipe.sinks.transactional import TransactionalSink

OWN_TABLES = """
CREATE TABLE IF NOT EXISTS datapipe_ledger (
    segment TEXT PRIMARY KEY, kind, lane, events, dead DEFAULT 0, duplicates DEFAULT 0, body,
    source, process, load, loaded_at REAL
);
CREATE TABLE IF NOT EXISTS datapipe_dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, lane, event, sqlstate, message, column_name, segment,
    created_at
);
CREATE TABLE IF NOT EXISTS datapipe_unknown (
    id INTEGER PRIMARY KEY AUTOINCREMENT, event_name, event, message, received_at
);
CREATE TABLE IF NOT EXISTS datapipe_processes (
    process TEXT PRIMARY KEY, mirror, beats, ended, host, grouped
);
"""

_T = TypeVar("_T")


class ToyTransaction:
    """See `Transaction`."""

    def __init__(self, connection: sqlite3.Connection, process: str) -> None:
        self._execute = connection.execute
        self._process = process

    def enter(
        self,
        kind: str,
        entries: Sequence[Entry],
        lane: str | None = None,
        load: str | None = None,
        not_after: float = math.inf,
    ) -> set[str]:
        now = time.time()
        if now >= not_after:
            return set()
        sql = (
            "INSERT INTO datapipe_ledger"
            " (segment, events, source, body, kind, lane, load, process, loaded_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
        )
        more = kind, lane, load, self._process, now
        return {entry.id for entry in entries if self._execute(sql, (*entry, *more)).rowcount}

    def lock(self, segments: Sequence[str]) -> dict[str, Known]:
        sql = "SELECT segment, load, dead, duplicates FROM datapipe_ledger WHERE segment = ?"
        rows = [row for id in segments for row in self._execute(sql, (id,))]
        return {id: Known(*rest) for id, *rest in rows}

    def bodies(self, ids: Sequence[str]) -> dict[str, str | None]:
        sql = "SELECT segment, body FROM datapipe_ledger WHERE segment = ?"
        return dict(row for id in ids for row in self._execute(sql, (id,)))

    def renew(self, claims: Sequence[str]) -> None:
        """Nothing: no claim is ever forgotten."""

    def book(self, counts: Sequence[tuple[str, int, int]]) -> None:
        for id, *numbers in counts:
            sql = "UPDATE datapipe_ledger SET dead = ?, duplicates = ? WHERE segment = ?"
            self._execute(sql, (*numbers, id))

    def copy(
        self, table: Table, columns: Sequence[Column], rows: Iterable[Rows]
    ) -> list[RefusedRow]:
        names = ", ".join(f'"{column.name}"' for column in columns)
        values = ", ".join(f":{column.name}" for column in columns)
        sql = f'INSERT INTO "{table.name}" ({names}) VALUES ({values})'
        refused = []
        for each in rows:
            for line in bytes(each.data).splitlines(keepends=True):
                text = event_json(table.name, columns, line)
                event = json.loads(text)
                sent = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
                event |= {c.name: bytes(sent[c.name]).decode() for c in columns if c.type == "json"}
                try:
                    self._execute(sql, {name: _storable(value) for name, value in event.items()})
                except sqlite3.IntegrityError as exc:
                    refused.append(RefusedRow(each.id, line, "23000", str(exc)))
        return refused

    def bury(self, letters: Sequence[Letter]) -> None:
        now = datetime.now(UTC).isoformat()
        for letter in letters:
            self._execute(
                "INSERT INTO datapipe_dead_letters"
                " (lane, event, sqlstate, message, column_name, segment, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*letter, now),
            )

    def kept(self, selection: Selection, after: int, limit: int) -> Sequence[Kept]:
        condition, values = where(selection)
        unknown = selection.shelf is Shelf.UNKNOWN
        columns = "event_name, event, received_at" if unknown else "lane, event, NULL"
        rows = self._execute(
            f"SELECT id, {columns} FROM {selection.shelf.value} WHERE {condition}"
            " AND id > ? ORDER BY id LIMIT ?",
            (*values, after, limit),
        )
        return [Kept(*row) for row in rows]

    def settle(self, shelf: Shelf, gone: Sequence[int], stay: Sequence[RefusedRow]) -> None:
        for id in gone:
            self._execute(f"DELETE FROM {shelf.value} WHERE id = ?", (id,))
        for each in stay:
            self._execute(
                f"UPDATE {shelf.value} SET message = ? WHERE id = ?", (each.message, each.id)
            )
            if each.sqlstate and shelf is Shelf.DEAD_LETTERS:
                sql = "UPDATE datapipe_dead_letters SET sqlstate = ? WHERE id = ?"
                self._execute(sql, (each.sqlstate, each.id))


class ToySink(TransactionalSink):
    """See `datapipe.sinks.Database`."""

    def __init__(self, path: Path, process: str) -> None:
        super().__init__(schema="main")
        self.version = sqlite3.sqlite_version
        self._path = path
        self._process = process

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        return await self._run(lambda connection: work(ToyTransaction(connection, self._process)))

    async def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Work in a transaction of its own. Raises: SinkUnavailable, LaneBlocked, TableMissing."""
        try:
            return await asyncio.to_thread(self._in_transaction, work)
        except sqlite3.OperationalError as exc:
            text = str(exc)
            if text.startswith("no such table") or "has no column" in text:
                raise TableMissing(text) from exc
            self.down(text)
            raise SinkUnavailable(text) from exc
        except sqlite3.Error as exc:
            raise LaneBlocked(str(exc)) from exc

    def _in_transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        connection = sqlite3.connect(self._path, timeout=30.0, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(OWN_TABLES)
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
        finally:
            connection.close()  # rolls back what did not commit
        return result

    # --- Sink ---

    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        def make(connection: sqlite3.Connection) -> list[str]:
            there = {row[1] for row in connection.execute(f'PRAGMA table_info("{table.name}")')}
            add = f'ALTER TABLE "{table.name}" ADD COLUMN '
            missing = [f'{add}"{each.name}"' for each in table.columns if each.name not in there]
            if there and "received_at" not in there:
                raise LaneBlocked(f'{table.name} has no received_at: {add}"received_at"')
            statements = missing if there else [table_ddl(table)]
            for statement in statements:
                connection.execute(statement)
            return statements

        return await self._run(make)

    async def hint(self, table: str) -> str:
        return f"sqlite3 {self._path} 'SELECT * FROM crash_report'"

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        found = [("ok", f"database: SQLite {self.version}, {self._path}")]
        for table in tables:
            sql = f'PRAGMA table_info("{table.name}")'
            rows = await self._run(lambda connection, sql=sql: connection.execute(sql).fetchall())
            if rows and "received_at" not in {row[1] for row in rows}:
                found.append(("fail", f"{table.name} has no received_at"))
        return found

    def ddl(self, tables: Sequence[Table]) -> str:
        return "\n".join([OWN_TABLES, *map(table_ddl, tables)])

    # --- Ledger ---

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return set(await self.transact("", lambda transaction: transaction.lock(segments)))

    async def expire(self, removed: Sequence[str]) -> None:
        sql = "DELETE FROM datapipe_ledger WHERE segment = ?"
        ids = [(segment,) for segment in removed]
        await self._run(lambda connection: connection.executemany(sql, ids))

    async def expire_source(self, source: str, process: str) -> None:
        def forget(connection: sqlite3.Connection) -> None:
            for place in ("datapipe_ledger WHERE source", "datapipe_processes WHERE mirror"):
                connection.execute(f"DELETE FROM {place} = ? AND process <> ?", (source, process))

        await self._run(forget)

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        sql = (
            "DELETE FROM datapipe_ledger"
            " WHERE kind = 'segment' AND source = ? AND lane = ? AND loaded_at < ?"
        )
        old = [(source, lane, at) for lane, at in before.items()]
        await self._run(lambda connection: connection.executemany(sql, old))

    async def now(self) -> float:
        return time.time()

    async def find_mark(self, prefix: str) -> Mark | None:
        sql = "SELECT body, events = 1 FROM datapipe_ledger WHERE segment = ?"
        rows = await self._run(lambda c: c.execute(sql, (f"cluster:{prefix}",)).fetchall())
        return Mark(rows[0][0], bool(rows[0][1])) if rows else None

    async def mark(self, prefix: str) -> Mark:
        entry = Entry(f"cluster:{prefix}", body=uuid4().hex)
        await self.transact("", lambda transaction: transaction.enter("cluster", [entry]))
        mark = await self.find_mark(prefix)
        assert mark is not None
        return mark

    async def confirm_mark(self, prefix: str, id: str) -> None:
        sql = "UPDATE datapipe_ledger SET events = 1 WHERE segment = ? AND body = ?"
        await self._run(lambda connection: connection.execute(sql, (f"cluster:{prefix}", id)))

    # --- Heartbeats ---

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        def show(connection: sqlite3.Connection) -> dict[str, Beat]:
            connection.execute(
                "INSERT INTO datapipe_processes VALUES (?, ?, 1, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET beats = beats + 1, ended = excluded.ended",
                (beat.process, beat.mirror, beat.ended, beat.host, beat.group),
            )
            connection.execute(
                "DELETE FROM datapipe_processes WHERE mirror = ? AND process <> ?",
                (beat.mirror, beat.process),
            )
            rows = connection.execute(
                "SELECT process, beats, ended, host, grouped FROM datapipe_processes"
            )
            return {
                process: Beat(beats, bool(ended), host, group)
                for process, beats, ended, host, group in rows
            }

        return await self._run(show)

    # --- Shelves ---

    async def find(self, selection: Selection, limit: int) -> dict[str, Any]:
        condition, values = where(selection)

        def look_for_unknown(connection: sqlite3.Connection) -> dict[str, Any]:
            groups = connection.execute(
                "SELECT event_name, count(*), count(message), min(message) FROM datapipe_unknown"
                f" WHERE {condition} GROUP BY event_name ORDER BY count(*) DESC, event_name",
                values,
            ).fetchall()
            letters = connection.execute(
                "SELECT id, event_name, event, message, received_at FROM datapipe_unknown"
                f" WHERE {condition} ORDER BY id DESC LIMIT ?",
                (*values, limit),
            )
            shown = [(*row[:4], datetime.fromisoformat(with_offset(row[4]))) for row in letters]
            return found_unknown(sum(group[1] for group in groups), groups[:UNKNOWN_GROUPS], shown)

        def look(connection: sqlite3.Connection) -> dict[str, Any]:
            groups = connection.execute(
                "SELECT lane, sqlstate, min(message), count(*) FROM datapipe_dead_letters"
                f" WHERE {condition} GROUP BY lane, sqlstate ORDER BY count(*) DESC",
                values,
            )
            letters = connection.execute(
                "SELECT id, lane, event, sqlstate, message, column_name, created_at"
                f" FROM datapipe_dead_letters WHERE {condition} ORDER BY id DESC LIMIT ?",
                (*values, limit),
            )
            shown = [(*letter[:6], datetime.fromisoformat(letter[6])) for letter in letters]
            return found(groups.fetchall(), shown)

        unknown = selection.shelf is Shelf.UNKNOWN
        return await self._run(look_for_unknown if unknown else look)

    async def drop(self, selection: Selection) -> int:
        condition, values = where(selection)
        sql = f"DELETE FROM {selection.shelf.value} WHERE {condition}"
        return await self._run(lambda connection: connection.execute(sql, values).rowcount)

    async def samples(self, names: Sequence[str], each: int) -> dict[str, list[str]]:
        sql = "SELECT event FROM datapipe_unknown WHERE event_name = ? ORDER BY id DESC LIMIT ?"

        def look(connection: sqlite3.Connection) -> dict[str, list[str]]:
            return {
                name: [event for (event,) in connection.execute(sql, (name, each))]
                for name in names
            }

        return await self._run(look)

    async def remove_expired(self, table: Table) -> bool:
        if table.name != Shelf.UNKNOWN.value or not table.retention_s:
            return False
        before = datetime.fromtimestamp(time.time() - table.retention_s, UTC).replace(tzinfo=None)
        sql = "DELETE FROM datapipe_unknown WHERE received_at < ?"
        await self._run(lambda connection: connection.execute(sql, (str(before),)))
        return False


def table_ddl(table: Table) -> str:
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    return f'CREATE TABLE IF NOT EXISTS "{table.name}" ({names});'


def where(selection: Selection) -> tuple[str, list[Any]]:
    """A selection as an SQL condition and its values."""
    conditions, values = ["true"], []
    lane = "event_name" if selection.shelf is Shelf.UNKNOWN else "lane"
    for column, among in (("id", selection.ids), (lane, selection.lanes)):
        if among is not None:
            conditions.append(f"{column} IN ({', '.join('?' * len(among))})")
            values += among
    state = "coalesce(sqlstate, '')"
    for column, value in ((lane, selection.lane), (state, selection.sqlstate)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    return " AND ".join(conditions), values


def _storable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


class ToyPlugin(SinkPlugin):
    """What the entry point names. `database_url` is `toy://` and the path of the file."""

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[ToySink]:
        yield ToySink(Path(settings.database_url.removeprefix("toy://")), process)
