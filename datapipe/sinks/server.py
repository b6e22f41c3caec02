"""Databases that are servers: a pool of connections for small work, and one in a thread per load.

The connections of a pool are dead after a restart of the server and may say so only when used, so
a failure of the connection is tried once more on a new one.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks.dialect import OWN_TABLES, Dialect
from datapipe.sinks.sql import SqlSink
from datapipe.sinks.sql_tables import Result, Statement
from datapipe.sinks.threads import Sessions
from datapipe.sinks.transaction import Transaction
from datapipe.sinks.verdict import Verdict, error_of

_C = TypeVar("_C")
_T = TypeVar("_T")


class Pool(ABC):
    """A few connections, kept; the dead ones are found by use. One that fails is closed alone."""

    def __init__(self, size: int) -> None:
        self._turns = asyncio.Semaphore(size)
        self._free: list[Any] = []

    @abstractmethod
    async def connect(self) -> Any:
        """A new connection, in autocommit. Raises: the driver's errors, OSError."""

    def is_closed(self, connection: Any) -> bool:
        """Whether it broke while nobody used it, if that is known."""
        return False

    def close_one(self, connection: Any) -> None:
        """Close one that nobody uses; it may be closed."""
        connection.close()

    @asynccontextmanager
    async def cursor(self) -> AsyncIterator[Any]:
        """Of a connection that is free, or a new one; not used again after an error.

        Raises: the driver's errors, OSError.
        """
        async with self._turns:
            free = self._free
            connection = self._take() or await self.connect()
            try:
                async with connection.cursor() as cursor:
                    yield cursor
            except BaseException:
                self.close_one(connection)
                raise
            if free is self._free:
                free.append(connection)
            else:
                self.close_one(connection)

    def _take(self) -> Any:
        while self._free:
            connection = self._free.pop()
            if not self.is_closed(connection):
                return connection
            self.close_one(connection)
        return None

    def renew(self) -> None:
        """Close those that are free, the others as soon as they are."""
        free, self._free = self._free, []
        for connection in free:
            self.close_one(connection)

    def close(self) -> None:
        """Close all of it, for good."""
        self.renew()


class ServerSink(SqlSink, Generic[_C]):
    """See `SqlSink`; what is abstract here is the driver's.

    Attributes: driver_error: the class of all that the driver raises. answer_within_s: for a small
        piece of work.
    """

    driver_error: type[Exception]
    answer_within_s = 20.0

    def __init__(
        self, dialect: Dialect, settings: Settings, process: str, pool: Pool, loads: Sessions[_C]
    ) -> None:
        super().__init__(dialect, settings, process)
        self._pool = pool
        self._loads = loads
        self._backends: dict[str, int] = {}  # the server's ids of loads under way, by lane

    @abstractmethod
    def verdict(self, exc: Any) -> Verdict:
        """What an error of the driver's means."""

    @abstractmethod
    def has_answered(self, exc: Any) -> bool:
        """Whether an error of the driver's is what the server said, and said as it goes on."""

    @abstractmethod
    def described(self, exc: Any) -> tuple[str, str]:
        """What the server said, in one line and without secrets; its code, if it has one."""

    @abstractmethod
    def connected(self) -> _C:
        """A new connection for a load; blocks. Raises: the driver's errors."""

    @abstractmethod
    def begin(self, connection: _C) -> tuple[int, Transaction]:
        """Begin a load; the server's id of it. Raises: the driver's errors, SinkUnavailable."""

    @abstractmethod
    def commit(self, connection: _C) -> None:
        """End it. Raises: the driver's errors, SinkUnavailable."""

    @abstractmethod
    async def begin_small(self, cursor: Any) -> None:
        """Begin a transaction on our own tables. Raises: the driver's errors, SinkUnavailable."""

    def is_worth_repeating(self, exc: Exception, left: int) -> bool:
        """Whether small work may succeed at once, on a new connection. Args: left: tries."""
        is_drivers = isinstance(exc, self.driver_error)
        return left == 2 and is_drivers and self.verdict(exc) is Verdict.DOWN

    # --- small work ---

    async def run(self, work: Callable[[Any], Awaitable[_T]], lane: str | None = None) -> _T:
        """Do something with a cursor, in autocommit; on a dead connection, once more.

        Args: lane: whose work it is, if it is one lane's.
        Raises: SinkUnavailable, or LaneBlocked for what only a person can repair.
        """
        for left in (2, 1, 0):
            try:
                return await self._once(work)
            except (self.driver_error, OSError) as exc:
                if left == 0 or not self.is_worth_repeating(exc, left):
                    raise self._error(exc, lane) from exc
        raise AssertionError

    async def _once(self, work: Callable[[Any], Awaitable[_T]]) -> _T:
        try:
            async with asyncio.timeout(self.answer_within_s), self._pool.cursor() as cursor:
                started = time.perf_counter()
                result = await work(cursor)
                self.answer_s = time.perf_counter() - started
        except self.driver_error as exc:
            if self.verdict(exc) is Verdict.DOWN:
                self._pool.renew()
            raise
        except OSError:  # TimeoutError as well
            self._pool.renew()
            raise
        if self.state().up is None and self.version:
            self.works(started)
        return result

    def _error(self, exc: Exception, lane: str | None) -> SinkUnavailable | LaneBlocked:
        """Our error to raise for it; notes that the database is down, if that is what it means."""
        if isinstance(exc, self.driver_error):
            kind, (text, code) = self.verdict(exc), self.described(exc)
            refuses = self.has_answered(exc)
        else:
            kind, text, code = Verdict.DOWN, str(exc) or "no answer in time", ""
            refuses = False
        if kind is Verdict.DOWN:
            self.down(text, refuses=refuses)
        return error_of(kind, text, code, lane)

    async def query(self, sql: str, *values: Any, lane: str | None = None) -> list[tuple[Any, ...]]:
        """See `SqlSink.query`."""
        return await self.run(partial(fetch, sql=sql, values=values), lane)

    async def transaction(self, *statements: Statement) -> Result:
        """See `SqlSink.transaction`."""

        async def work(cursor: Any) -> Result:
            await self.begin_small(cursor)
            for sql, values in statements:
                result = Result(await fetch(cursor, sql, values), cursor.rowcount)
            await cursor.execute("COMMIT")
            return result

        return await self.run(work, OWN_TABLES[0].name)

    # --- loads ---

    async def transact(self, lane: str, work: Callable[[Transaction], _T]) -> _T:
        """See `TransactionalSink.transact`."""

        def whole(connection: _C) -> _T:
            self._backends[lane], transaction = self.begin(connection)
            result = work(transaction)
            self.commit(connection)
            return result

        try:
            return await self._loads.run(self.connected, whole)
        except self.driver_error as exc:
            raise self._error(exc, lane) from exc
        finally:
            self._backends.pop(lane, None)

    def down(self, error: str, *, refuses: bool = False) -> None:
        """See `TransactionalSink.down`."""
        super().down(error, refuses=refuses)
        self._loads.close_idle()

    def abort(self) -> None:
        """See `Sink.abort`."""
        self._loads.abort()

    async def close(self) -> None:
        """End all of it; returns within a second or so."""
        await self._loads.close()
        self._pool.close()


async def fetch(cursor: Any, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """The rows of a statement; of one without rows, none."""
    await cursor.execute(sql, values)
    return list(await cursor.fetchall()) if cursor.description else []
