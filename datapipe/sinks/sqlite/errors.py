"""What follows from an error code of SQLite: the one table of it.

Source of the codes: SQLite documentation, "Result and Error Codes".
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.sinks.transaction import TableMissing
from datapipe.sinks.verdict import Verdict

# By the primary code, which is the lowest byte of an extended one. All others are of the whole
# file: BUSY (only after a long wait), READONLY, IOERR, CORRUPT, FULL, CANTOPEN, NOTADB, NOMEM, ...
_BY_CODE = {
    sqlite3.SQLITE_ABORT: Verdict.LATER,
    sqlite3.SQLITE_INTERRUPT: Verdict.LATER,
    sqlite3.SQLITE_LOCKED: Verdict.LATER,
    sqlite3.SQLITE_SCHEMA: Verdict.LATER,  # somebody changes tables again and again
    sqlite3.SQLITE_CONSTRAINT: Verdict.ROW,
    sqlite3.SQLITE_MISMATCH: Verdict.ROW,
    sqlite3.SQLITE_TOOBIG: Verdict.ROW,
    sqlite3.SQLITE_ERROR: Verdict.BLOCKED,
}

# All of these are SQLITE_ERROR, as is whatever else is wrong with a statement
_MISSING = re.compile("no such table|no such column|has no column named")

AWAY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL)  # not a matter of settings

_SAID = {
    sqlite3.SQLITE_BUSY: "another program has locked it",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened, or its folder is missing or can't be written",
    sqlite3.SQLITE_FULL: "its disk is full",
    sqlite3.SQLITE_NOTADB: "it is not an SQLite database",
    sqlite3.SQLITE_READONLY: "it, or its folder, can't be written",
}


def primary(exc: sqlite3.Error) -> int:
    """The primary code; 0: the error is not SQLite's but the driver's."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF


def verdict(exc: sqlite3.Error) -> Verdict:
    """What an error means."""
    code = primary(exc)
    if code == sqlite3.SQLITE_ERROR and _MISSING.search(str(exc)):
        return Verdict.MISSING
    return _BY_CODE.get(code, Verdict.DOWN)


def may_be_of_a_row(exc: sqlite3.Error) -> bool:
    """Whether a row may be to blame, of a statement that is known to be right without rows.

    What a CHECK, a trigger or a generated column calculates may fail for the values of a row
    (malformed JSON, integer overflow), as SQLITE_ERROR.
    """
    return verdict(exc) is Verdict.ROW or primary(exc) == sqlite3.SQLITE_ERROR


def state_of(exc: sqlite3.Error) -> str:
    """The name of the code, which stands where other databases have an SQLSTATE."""
    name: str = getattr(exc, "sqlite_errorname", "SQLITE_ERROR")
    # Python 3.11 does not know the one code that came with STRICT tables
    return "SQLITE_CONSTRAINT_DATATYPE" if name == "unknown" else name


def one_line(exc: sqlite3.Error) -> str:
    """What the database said."""
    return " ".join(str(exc).split()) or type(exc).__name__


def error_of(
    exc: sqlite3.Error, path: Path, lane: str | None = None
) -> SinkUnavailable | LaneBlocked:
    """Our error for it, which says what happens next. Args: path: of the file."""
    kind, text = verdict(exc), one_line(exc)
    if said := _SAID.get(primary(exc)):
        text = f"{path}: {said} ({text})"
    if kind is Verdict.MISSING:
        return TableMissing(f"{text} ({state_of(exc)})")
    if kind in (Verdict.DOWN, Verdict.LATER) or lane is None:
        return SinkUnavailable(text, everywhere=kind is not Verdict.LATER)
    return LaneBlocked(f"{text} ({state_of(exc)})")
