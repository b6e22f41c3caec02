"""The databases that datapipe can load into: an empty one of each, and the fastest load it has.

The fastest load gets the same rows ready in memory, one transaction a load, into a table that
datapipe made: no ledger, nothing to parse or to find, should a row be refused.
"""

from __future__ import annotations

import io
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any

import psycopg2

from benchmarks import loads, servers
from benchmarks.copying import COPY_BYTES
from benchmarks.events import NAMES, TABLE, Crash, as_rows, as_values
from tests.mariadb import MariaDB
from tests.postgres import Postgres

_BUFFERS = "128M"  # PostgreSQL's shared_buffers


class Store(ABC):
    """One database system. Attributes: fastest: the name of its own fastest load."""

    name: str
    version: str
    fastest: str

    @abstractmethod
    def database(self) -> AbstractContextManager[str]:
        """The URL of an empty one; it is dropped."""

    @abstractmethod
    def rows(self, url: str) -> int:
        """How many are committed."""

    @abstractmethod
    def cpu_s(self) -> float:
        """CPU seconds of its server so far."""

    @abstractmethod
    def bare(self, url: str, batch: Sequence[Crash]) -> AbstractContextManager[Callable[[], None]]:
        """What inserts this batch, as fast as can be, into the table that is there; and commits."""


class PostgresStore(Store):
    name, fastest = "PostgreSQL", "copy_expert"

    def __init__(self, server: Postgres) -> None:
        self._server = server
        ((version,),) = server.execute(server.url("postgres"), "SHOW server_version")
        self.version = version.split()[0]

    def database(self) -> AbstractContextManager[str]:
        return loads.database(self._server)

    def rows(self, url: str) -> int:
        return loads.rows(self._server, url)

    def cpu_s(self) -> float:
        return servers.postgres(self._server).cpu_s()

    @contextmanager
    def bare(self, url: str, batch: Sequence[Crash]) -> Iterator[Callable[[], None]]:
        data = as_rows(batch)
        with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:

            def load() -> None:
                statement = f"COPY {TABLE} ({NAMES}) FROM STDIN"
                cursor.copy_expert(statement, io.BytesIO(data), COPY_BYTES)
                connection.commit()

            yield load


class MariaDbStore(Store):
    name, fastest = "MariaDB", "LOAD DATA LOCAL"

    def __init__(self, server: MariaDB) -> None:
        self._server = server
        ((version,),) = server.execute(server.url("mysql"), "SELECT VERSION()")
        self.version = version.partition("-")[0]

    def database(self) -> AbstractContextManager[str]:
        return self._database()

    @contextmanager
    def _database(self) -> Iterator[str]:
        url = self._server.create_database()
        try:
            yield url
        finally:
            name = url.rpartition("/")[2]
            self._server.execute(self._server.url("mysql"), f"DROP DATABASE {name}")

    def rows(self, url: str) -> int:
        ((count,),) = self._server.execute(url, f"SELECT count(*) FROM {TABLE}")
        return int(count)

    def cpu_s(self) -> float:
        pid = int((self._server.folder / "pid").read_text())
        return servers.Server(pid, self._server.url("mysql")).cpu_s()

    @contextmanager
    def bare(self, url: str, batch: Sequence[Crash]) -> Iterator[Callable[[], None]]:
        """PyMySQL reads a file, which is memory that has a name."""
        with ExitStack() as stack:
            file = stack.enter_context(open(os.memfd_create("rows"), "wb"))
            file.write(as_rows(batch))
            file.flush()
            connection = self._server.connect(url, autocommit=False, local_infile=True)
            cursor = stack.enter_context(stack.enter_context(connection).cursor())
            names = NAMES.replace('"', "")
            statement = (
                f"LOAD DATA LOCAL INFILE '/proc/self/fd/{file.fileno()}' INTO TABLE {TABLE}"
                f" CHARACTER SET utf8mb4 ({names})"
            )

            def load() -> None:
                cursor.execute(statement)
                connection.commit()

            yield load


class SqliteStore(Store):
    name, fastest = "SQLite", "executemany of ready tuples"
    version = sqlite3.sqlite_version

    def database(self) -> AbstractContextManager[str]:
        return self._database()

    @contextmanager
    def _database(self) -> Iterator[str]:
        with servers.work_folder() as folder:
            yield f"sqlite:///{folder / 'events.db'}"  # an absolute path

    def rows(self, url: str) -> int:
        with closing(self._connect(url)) as connection:
            ((count,),) = connection.execute(f"SELECT count(*) FROM {TABLE}")
            return int(count)

    def cpu_s(self) -> float:
        return 0.0

    def _connect(self, url: str) -> sqlite3.Connection:
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @contextmanager
    def bare(self, url: str, batch: Sequence[Crash]) -> Iterator[Callable[[], None]]:
        values = as_values(batch)
        with closing(self._connect(url)) as connection:

            def load() -> None:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(f"INSERT INTO {TABLE} ({NAMES}) VALUES (?, ?, ?, ?)", values)
                connection.execute("COMMIT")

            yield load


STORES: tuple[type[Store], ...] = (PostgresStore, MariaDbStore, SqliteStore)


@contextmanager
def opened(postgres: Any) -> Iterator[list[Store]]:
    """All of them, PostgreSQL first."""
    with MariaDB.running(innodb_buffer_pool_size=_BUFFERS) as mariadb:
        yield [PostgresStore(postgres), MariaDbStore(mariadb), SqliteStore()]
