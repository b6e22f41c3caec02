"""The databases that faults are tried on, behind one small interface.

Most are a server, which can be stopped, crashed and frozen. SQLite has none: what stops there is
the folder of the file, which is moved away, as a volume is that is unmounted; and what freezes is
another process, in the middle of a transaction.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from tests.mariadb import MariaDB
from tests.postgres import Postgres

_LOCKED_S = 30.0


class Server(Protocol):
    """Where databases of one kind are."""

    def create_database(self) -> str:
        """A new, empty database; its URL."""

    def start(self) -> None:
        """Start it and wait until it answers."""

    def stop(self) -> None:
        """End it in order; returns when it is gone."""

    def crash(self) -> None:
        """End it in the middle of whatever it does."""

    def freeze(self) -> None:
        """From now on nobody gets an answer, or nobody can write; `thaw` ends it."""

    def thaw(self) -> None: ...

    def remove(self) -> None:
        """End it, and delete all that it has."""


class SqliteFiles:
    """Files in one folder. The process of the tests is the other one that uses them."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="datapipe-test-sqlite-", dir="/var/tmp"))
        self.folder = self._home / "there"
        self.folder.mkdir()
        self._away = self._home / "away"
        self._frozen: list[sqlite3.Connection] = []

    def create_database(self) -> str:
        """The URL of a file that is not there yet."""
        return f"sqlite:///{self.folder}/t{uuid4().hex[:12]}.db"

    def start(self) -> None:
        """Bring the folder back."""
        if self._away.exists():
            self._away.rename(self.folder)

    def stop(self) -> None:
        """Take the folder away; whoever has the file open can still finish a transaction."""
        self.folder.rename(self._away)

    crash = stop

    def freeze(self) -> None:
        """Hold the lock of each file, as a process does that is frozen while it writes."""
        for path in self.folder.glob("*.db"):
            connection = sqlite3.connect(
                path, isolation_level=None, timeout=0, check_same_thread=False
            )
            self._frozen.append(connection)
            _locked(connection)

    def thaw(self) -> None:
        while self._frozen:
            self._frozen.pop().close()

    def remove(self) -> None:
        self.thaw()
        shutil.rmtree(self._home, ignore_errors=True)


def _locked(connection: sqlite3.Connection) -> None:
    """Begin to write, as soon as nobody else does: SQLite itself would rarely look."""
    until = time.monotonic() + _LOCKED_S
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)
        else:
            return


KINDS = ("postgres", "mariadb", "sqlite")


@contextmanager
def running(kind: str) -> Iterator[Server]:
    """A server that flushes what it commits, as long as the block lasts."""
    server: Server
    if kind == "postgres":
        server = Postgres(fsync="on")
    else:
        server = MariaDB() if kind == "mariadb" else SqliteFiles()
    try:
        server.start()
        yield server
    finally:
        server.remove()


# --- what is in a database, whatever its kind ---


def execute(url: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """Run SQL in autocommit; the rows, if it gives any. Parameters are marked with `%s`."""
    if url.startswith("sqlite:"):
        with closing(connection := sqlite3.connect(path_of(url), isolation_level=None)):
            return connection.execute(sql.replace("%s", "?"), values).fetchall()
    return (Postgres if url.startswith("postgresql:") else MariaDB).execute(url, sql, *values)


async def aexecute(url: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    return await asyncio.to_thread(execute, url, sql, *values)


def path_of(url: str) -> Path:
    """The file of an SQLite database."""
    return Path(url.removeprefix("sqlite:///"))


def has(url: str, table: str) -> bool:
    """Whether there is such a table."""
    if url.startswith("sqlite:"):
        if not path_of(url).exists():
            return False  # to look would make it
        sql = "SELECT 1 FROM sqlite_master WHERE name = %s"
    else:
        schema = "current_schema()" if url.startswith("postgresql:") else "DATABASE()"
        sql = (
            "SELECT 1 FROM information_schema.tables WHERE table_name = %s"
            f" AND table_schema = {schema}"
        )
    return bool(execute(url, sql, table))


def dead_ids(url: str) -> Counter[tuple[str, int]]:
    """How often the event of each lane and `user_id` is among the dead letters."""
    if not has(url, "datapipe_dead_letters"):
        return Counter()
    letters = execute(url, "SELECT lane, event FROM datapipe_dead_letters")
    events = ((lane, json.loads(e) if isinstance(e, str) else e) for lane, e in letters)
    return Counter((lane, event["user_id"]) for lane, event in events)


def make_refusing(url: str, table: str, times: int) -> None:
    """A table that refuses whatever `user_id` is a multiple of this; a service completes it."""
    time_type = {"postgresql": "timestamptz", "mysql": "DATETIME(6)"}.get(url.split(":")[0], "TEXT")
    execute(
        url,
        f"CREATE TABLE {table} (user_id BIGINT CHECK (user_id % {times} <> 0),"
        f" received_at {time_type})",
    )
