"""Damaged journal files: kept aside, never deleted; what can be read of them is not lost.

A row is read if its page is, and believed if its checksum fits. Damage is skipped by looking for
the first position behind it that can be reached: each damaged page costs its own rows only.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datapipe.settings import Settings

_COLUMNS = "position, lane, id, events, bytes, created_at, crc, head, data"
_LAST = 2**62


def is_damage(exc: sqlite3.Error) -> bool:
    """The file is wrong, and not the disk: a full or read-only one is an OperationalError."""
    return type(exc) is sqlite3.DatabaseError


def crc_of(lane: str, id: str, events: int, head: bytes, data: bytes) -> int:
    """The checksum of a row."""
    return zlib.crc32(data, zlib.crc32(head, zlib.crc32(f"{lane} {id} {events}".encode())))


def set_aside(path: Path) -> Path:
    """Rename the file, and its log with it, so that SQLite still finds the one with the other."""
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
    while kept.exists():
        kept = kept.with_name(f"{kept.name}x")
    for suffix in ("", "-wal"):
        if (file := path.with_name(path.name + suffix)).exists():
            file.rename(f"{kept}{suffix}")
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)  # an index of the log: made anew
    return kept


def rescue(damaged: Path, fresh: sqlite3.Connection) -> tuple[int, int]:
    """Copy what can be read into an empty journal, positions and all, in one transaction.

    Returns: rows copied, and rows and gaps seen.
    """
    copied = seen = 0
    fresh.execute("BEGIN IMMEDIATE")
    try:
        for connection in _openings(damaged, fresh):
            for row in _rows(connection):
                seen += 1
                if row is not None:
                    marks = ", ".join("?" * len(row))
                    copied += fresh.execute(
                        f"INSERT OR IGNORE INTO segments ({_COLUMNS}) VALUES ({marks})", row
                    ).rowcount
            _keep_name(connection, fresh)
            connection.close()
            if copied:
                break
        fresh.execute("COMMIT")
    except BaseException:
        fresh.execute("ROLLBACK")
        raise
    return copied, seen


def _openings(damaged: Path, fresh: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """The file as it is; then, if that gives nothing, a copy with the first page of a new one.

    The first page holds the header and the schema, which is the same in all journals.
    """
    yield _open(damaged)
    (page_size,) = fresh.execute("PRAGMA page_size").fetchone()
    (path,) = [file for _, name, file in fresh.execute("PRAGMA database_list") if name == "main"]
    fresh_page = Path(f"{path}.page")
    copy = damaged.with_name(f"{damaged.name}.copy")
    try:
        with sqlite3.connect(fresh_page, isolation_level=None) as other:
            pass
        yield from ()
    finally:
        fresh_page.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


