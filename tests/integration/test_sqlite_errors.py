"""Error codes of SQLite, class by class, each from a real file: what follows from them."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.sinks.sqlite.errors import error_of, may_be_of_a_row, state_of, verdict
from datapipe.sinks.transaction import TableMissing
from datapipe.sinks.verdict import Verdict

TABLE = (
    "CREATE TABLE install (id INTEGER PRIMARY KEY, user_id INTEGER NOT NULL UNIQUE,"
    " note TEXT CHECK (note <> 'bad'), of INTEGER REFERENCES install) STRICT"
)
TRIGGER = "CREATE TRIGGER no BEFORE INSERT ON install BEGIN SELECT RAISE({how}, 'said no'); END"
ROW = "INSERT INTO install (user_id) VALUES (1)"


def opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(opened(path)) as connection:
        connection.execute(TABLE)
        yield connection


def statement(*statements: str) -> Callable[[Path], None]:
    """The last of them fails, in a database with that table."""

    def provoke(path: Path) -> None:
        with database(path) as connection:
            for each in statements:
                connection.execute(each)

    return provoke


def busy(path: Path) -> None:
    with database(path) as connection, closing(opened(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        connection.execute(ROW)


def locked(path: Path) -> None:
    with database(path) as connection:
        connection.executemany("INSERT INTO install (user_id) VALUES (?)", [(1,), (2,)])
        reading = connection.execute("SELECT * FROM install")
        reading.fetchone()
        connection.execute("DROP TABLE install")


def rolled_back_while_read(path: Path) -> None:
    with database(path) as connection:
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO install (user_id) VALUES (?)", [(n,) for n in range(9)])
        connection.execute("CREATE TABLE other (n)")
        reading = connection.execute("SELECT * FROM install")
        reading.fetchone()
        connection.execute("ROLLBACK")
        reading.fetchall()


def read_only(path: Path) -> None:
    with database(path), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as other:
        other.execute(ROW)


def no_folder(path: Path) -> None:
    opened(path / "none" / "events.db")


def no_database(path: Path) -> None:
    path.write_bytes(b"hello, world! " * 100)
    opened(path).execute("SELECT * FROM sqlite_schema")


def corrupt(path: Path) -> None:
    with database(path):
        pass
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 50)
    opened(path).execute(ROW)


def full(path: Path) -> None:
    with database(path) as connection:
        ((pages,),) = connection.execute("PRAGMA page_count")
        connection.execute(f"PRAGMA max_page_count = {pages}")
        connection.execute("INSERT INTO install (user_id, note) VALUES (1, hex(randomblob(9999)))")


def io_error(path: Path) -> None:
    with database(path) as connection:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            connection.execute(ROW)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupted(path: Path) -> None:
    with database(path) as connection:
        connection.set_progress_handler(lambda: 1, 1)
        connection.execute(ROW)


def too_big(path: Path) -> None:
    with database(path) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
        connection.execute("INSERT INTO install (user_id, note) VALUES (1, ?)", ("x" * 2000,))


def closed(path: Path) -> None:
    connection = opened(path)
    connection.close()
    connection.execute(ROW)


CASES = {
    "busy": (busy, "SQLITE_BUSY", Verdict.DOWN),
    "read-only": (read_only, "SQLITE_READONLY", Verdict.DOWN),
    "no folder": (no_folder, "SQLITE_CANTOPEN", Verdict.DOWN),
    "no database": (no_database, "SQLITE_NOTADB", Verdict.DOWN),
    "corrupt": (corrupt, "SQLITE_CORRUPT", Verdict.DOWN),
    "full": (full, "SQLITE_FULL", Verdict.DOWN),
    "I/O error": (io_error, "SQLITE_IOERR_WRITE", Verdict.DOWN),
    "closed": (closed, "SQLITE_ERROR", Verdict.DOWN),  # of the driver, without a code
    "locked": (locked, "SQLITE_LOCKED", Verdict.LATER),
    "rolled back": (rolled_back_while_read, "SQLITE_ABORT_ROLLBACK", Verdict.LATER),
    "interrupted": (interrupted, "SQLITE_INTERRUPT", Verdict.LATER),
    "no table": (statement("INSERT INTO purchase VALUES (1)"), "SQLITE_ERROR", Verdict.MISSING),
    "no column": (
        statement("INSERT INTO install (other) VALUES (1)"),
        "SQLITE_ERROR",
        Verdict.MISSING,
    ),
    "syntax": (statement("INSERT INTO"), "SQLITE_ERROR", Verdict.BLOCKED),
    "a view": (
        statement("CREATE VIEW v AS SELECT 1", "INSERT INTO v VALUES (1)"),
        "SQLITE_ERROR",
        Verdict.BLOCKED,
    ),
    "not null": (
        statement("INSERT INTO install (user_id) VALUES (NULL)"),
        "SQLITE_CONSTRAINT_NOTNULL",
        Verdict.ROW,
    ),
    "unique": (statement(ROW, ROW), "SQLITE_CONSTRAINT_UNIQUE", Verdict.ROW),
    "primary key": (
        statement(ROW, "INSERT INTO install (id, user_id) VALUES (1, 2)"),
        "SQLITE_CONSTRAINT_PRIMARYKEY",
        Verdict.ROW,
    ),
    "check": (
        statement("INSERT INTO install (user_id, note) VALUES (1, 'bad')"),
        "SQLITE_CONSTRAINT_CHECK",
        Verdict.ROW,
    ),
    "foreign key": (
        statement("INSERT INTO install (user_id, of) VALUES (1, 99)"),
        "SQLITE_CONSTRAINT_FOREIGNKEY",
        Verdict.ROW,
    ),
    "type": (
        statement("INSERT INTO install (user_id) VALUES ('x')"),
        "SQLITE_CONSTRAINT_DATATYPE",
        Verdict.ROW,
    ),
    "raised": (
        statement(TRIGGER.format(how="ABORT"), ROW),
        "SQLITE_CONSTRAINT_TRIGGER",
        Verdict.ROW,
    ),
    "mismatch": (
        statement("CREATE TABLE loose (id INTEGER PRIMARY KEY)", "INSERT INTO loose VALUES ('x')"),
        "SQLITE_MISMATCH",
        Verdict.ROW,
    ),
    "too big": (too_big, "SQLITE_TOOBIG", Verdict.ROW),
}


@pytest.mark.parametrize("case", CASES)
def test_what_follows_from_an_error(tmp_path: Path, case: str) -> None:
    provoke, state, expected = CASES[case]
    path = tmp_path / "events.db"
    with pytest.raises(sqlite3.Error) as caught:
        provoke(path)
    assert (state_of(caught.value), verdict(caught.value)) == (state, expected)
    of_a_row = expected is Verdict.ROW or (state == "SQLITE_ERROR" and case != "closed")
    assert may_be_of_a_row(caught.value) == of_a_row

    ours = error_of(caught.value, path, "install")
    kinds = {
        Verdict.MISSING: TableMissing,
        Verdict.BLOCKED: LaneBlocked,
        Verdict.ROW: LaneBlocked,  # no row can be named any more: a deferred key, at COMMIT
    }
    assert type(ours) is kinds.get(expected, SinkUnavailable)
    if isinstance(ours, SinkUnavailable):
        assert ours.everywhere == (expected is Verdict.DOWN)
    small = error_of(caught.value, path)  # of work that is no lane's
    assert type(small) is (TableMissing if expected is Verdict.MISSING else SinkUnavailable)
    assert "\n" not in str(ours)
    named = ("busy", "read-only", "no folder", "no database", "full")
    assert (str(path) in str(ours)) == (case in named)
