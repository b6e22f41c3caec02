"""What a sink in SQL is built on: how statements run, and how its tables are made and checked."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import structlog

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import Table
from datapipe.sinks.dialect import OWN_TABLES, UNKNOWN_TABLE, Dialect
from datapipe.sinks.transaction import TableMissing
from datapipe.sinks.transactional import TransactionalSink

log = structlog.stdlib.get_logger("datapipe.sinks")

Statement = tuple[str, Sequence[Any]]


class Result(NamedTuple):
    """Of a statement: its rows, if it gives any, and how many it has changed."""

    rows: list[tuple[Any, ...]]
    changed: int


class SqlTables(TransactionalSink):
    """Has tables. A subclass says how statements reach its server."""

    def __init__(self, dialect: Dialect, settings: Settings, process: str) -> None:
        super().__init__(dialect.schema or "main")
        self._dialect = dialect
        self._process = process
        self._ledger, self._letters, self._processes, self._unknown = (
            dialect.parameterized(f"datapipe_{name}")
            for name in ("ledger", "dead_letters", "processes", "unknown")
        )
        self._one_of = dialect.one_of.format("text")
        self._preparing = asyncio.Lock()
        self._prepared: set[Table] = set()

    @abstractmethod
    async def query(self, sql: str, *values: Any, lane: str | None = None) -> list[tuple[Any, ...]]:
        """The rows of one statement, in a transaction of its own.

        Args: lane: whose work it is, if it is one lane's.
        Raises: SinkUnavailable; of a lane's: LaneBlocked, TableMissing.
        """

    @abstractmethod
    async def transaction(self, *statements: Statement) -> Result:
        """Statements on our own tables, all or nothing; the result of the last.

        It need not wait for a standby: heartbeats come again, ledger rows that come back do no
        harm, and a load's own COMMIT waits for all that was written before it.
        Raises: SinkUnavailable, LaneBlocked; TableMissing: a right may be missing, too.
        """

    @abstractmethod
    async def read_version(self) -> str:
        """The server's. Raises: SinkUnavailable, LaneBlocked."""

    @abstractmethod
    async def columns(self, table: str) -> set[str] | None:
        """Those that a table has; None: there is no such table. Raises: SinkUnavailable."""

    @abstractmethod
    async def define(self, table: str, changes: Callable[[set[str] | None], Sequence[str]]) -> None:
        """Run the DDL that a table with these columns needs (see `columns`).

        Processes do it one after the other, and each looks anew: IF NOT EXISTS alone fails for one
        of two that come at once. Raises: SinkUnavailable, LaneBlocked.
        """

    @abstractmethod
    async def findings(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """What `check` has to say of the server, and of these tables, as they are.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def denied(self, table: Table, changes: Sequence[str]) -> str | None:
        """Which rights we lack to use this table as we do, and the statements that grant them.

        Never raises an error of the server's, for the sake of its log: this is asked again and
        again. None: we lack none, or the database has no rights.

        Args: changes: the DDL that makes or completes the table; maybe none.
        Raises: SinkUnavailable, LaneBlocked.
        """
        return None

    @abstractmethod
    def is_away(self, exc: BaseException | None) -> bool:
        """Whether the server does not answer now, or has no room: not a matter of settings."""

    # --- tables ---

    async def prepare(self, table: Table, *, again: bool = False) -> list[str]:
        """See `TransactionalSink.prepare`; our own tables, too."""
        wanted = (*OWN_TABLES, complete(table))
        if again:
            self._prepared.difference_update(wanted)
        if self._prepared.issuperset(wanted):
            return []  # nor does it wait for what another table waits for
        ran: list[str] = []
        async with self._preparing:
            await self._know_version()
            for each in wanted:
                if each not in self._prepared:
                    ran += await self._make(each)
                    self._prepared.add(each)
        return ran

    async def _know_version(self) -> None:
        if self.version is None:
            self.version = await self.read_version()

    async def _make(self, table: Table) -> list[str]:
        """Make or complete a table; the DDL that it took.

        Raises: SinkUnavailable, LaneBlocked; without a right of ours on one of our own tables
        nothing works, so that the database is down.
        """
        needed = self._changes(table, await self.columns(table.name))
        if denied := await self.denied(table, needed):
            why = f"table {table.name}: {denied}"
            if table in OWN_TABLES:
                self.down(why, refuses=True)
                raise SinkUnavailable(why)
            raise LaneBlocked(why)
        ran: list[str] = []

        def changes(there: set[str] | None) -> list[str]:
            ran[:] = self._changes(table, there)
            return ran

        if needed:
            await self.define(table.name, changes)
        return ran

    def _changes(self, table: Table, there: set[str] | None) -> list[str]:
        """The statements that make the table as it should be.

        Raises: LaneBlocked: it belongs to somebody else.
        """
        if there is None:
            return self._dialect.create(table)
        if not table.is_own and "received_at" not in there:
            received = [column for column in table.columns if column.name == "received_at"]
            raise LaneBlocked(
                f"table {table.name}: has no column received_at, so it is not datapipe's, and "
                "nothing is added to it: rename the event type, or, if its events belong there: "
                f"{'; '.join(self._dialect.add_columns(table, received))}"
            )
        missing = [column for column in table.columns if column.name not in there]
        return self._dialect.add_columns(table, missing)

    def ddl(self, tables: Sequence[Table]) -> str:
        """See `Sink.ddl`."""
        return self._dialect.script([complete(table) for table in tables])

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """See `Sink.check`."""
        try:
            await self._know_version()
            schema = f", schema {self._dialect.schema}" if self._dialect.schema else ""
            said = [("ok", f"database: {self.product} {self.version}{schema}")]
            wanted = (*OWN_TABLES, *map(complete, tables))
            said += await self.findings(wanted)
            for table in wanted:
                said += await self._check(table)
        except (SinkUnavailable, LaneBlocked) as exc:
            level = "away" if self.is_away(exc.__cause__) else "fail"
            state = self.state()
            which = f"{self.product} {state.trouble}: " if state.up is False else ""
            return [(level, f"database: {which}{exc}")]
        return said

    async def _check(self, table: Table) -> list[tuple[str, str]]:
        try:
            there = await self.columns(table.name)
            changes = self._changes(table, there)
        except LaneBlocked as exc:
            return [("fail", str(exc))]
        if denied := await self.denied(table, changes):
            return [("fail", f"table {table.name}: {denied}")]
        if changes:
            return [("ok", f"table {table.name}: {self._planned(table, there)} when needed")]
        return []

    def _planned(self, table: Table, there: set[str] | None) -> str:
        if there is None:
            return "will be created"
        missing = [column.name for column in table.columns if column.name not in there]
        return f"will add the column{'s' if missing[1:] else ''} {', '.join(missing)}"

    async def _own(self, *statements: Statement) -> Result:
        """The same as `transaction`; our tables are there, and may be used."""
        await self.prepare(OWN_TABLES[0])
        try:
            return await self.transaction(*statements)
        except TableMissing:  # dropped, altered or forbidden since
            await self.prepare(OWN_TABLES[0], again=True)
            return await self.transaction(*statements)


def complete(table: Table) -> Table:
    """With the columns that no row brings, which the table of unknown events has."""
    return UNKNOWN_TABLE if table.name == UNKNOWN_TABLE.name else table
