"""Damaged journal files: quarantined, never deleted; what can be read of them is not lost.

A row is read if its page is, and believed if its checksum fits. Damage is skipped by looking for
the first position behind it that can be reached: each damaged page costs its own rows only.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from datapipe.mirrors import unregistered
from datapipe.settings import Settings

MIN_FREE_BYTES = 64 * 1024 * 1024  # on a full disk even DELETE fails, so appends stop before
_COLUMNS = "position, lane, id, events, bytes, created_at, crc, head, data"
_BEHIND = "FROM segments NOT INDEXED WHERE position > ? ORDER BY position LIMIT 1"
_LAST = 2**40  # further on no gap is looked past
_JUMP = 2**32


def is_damage(exc: sqlite3.Error) -> bool:
    """The file is damaged; a full or read-only disk is an OperationalError."""
    return type(exc) is sqlite3.DatabaseError


def crc_of(lane: str, id: str, events: int, head: bytes, data: bytes) -> int:
    """The checksum of a row."""
    return zlib.crc32(data, zlib.crc32(head, zlib.crc32(f"{lane} {id} {events}".encode())))


def quarantine(path: Path) -> Path:
    """Rename the file, and its log with it; its new name."""
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
    while kept.exists():
        kept = kept.with_name(f"{kept.name}x")
    rename(path, kept)
    return kept


def rename(path: Path, to: Path) -> None:
    """With its log, so that SQLite still finds the one with the other; what is empty is dropped."""
    for suffix in ("", "-wal"):
        if (file := Path(f"{path}{suffix}")).exists() and file.stat().st_size:
            file.rename(f"{to}{suffix}")
    discard(path)  # an index of the log may be left, which is made anew


def discard(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def rescue(
    sources: Iterable[sqlite3.Connection], fresh: sqlite3.Connection, name: str | None
) -> tuple[int, int]:
    """Copy what can be read into an empty journal, positions and all, in one transaction.

    Args:
        sources: ways to read what is damaged; the first that gives anything stands.
        name: the journal's id, if it is known; else it is read, too.
    Returns: rows copied; gaps, and rows that were not what had been stored.
    """
    rows = gaps = 0
    fresh.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # its first page is in its file now
    with fresh:
        fresh.execute("BEGIN IMMEDIATE")
        for connection in sources:
            for row in _rows(connection):
                if row is None:
                    gaps += 1
                    continue
                marks = ", ".join("?" * len(row))
                fresh.execute(f"INSERT INTO segments ({_COLUMNS}) VALUES ({marks})", row)
                rows += 1
            name = name or _name(connection)
            if rows:
                break
        if name:
            fresh.execute("UPDATE meta SET journal = ?", (name,))
        fresh.execute("DELETE FROM sqlite_sequence")
        fresh.execute(  # no position is given out twice, whatever was lost at the end
            f"INSERT INTO sqlite_sequence SELECT 'segments', {_JUMP} + coalesce(max(position), 0)"
            " FROM segments"
        )
    return rows, gaps


def openings(damaged: Path, fresh: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """The file as it is; then a copy of it with the first page of a new one.

    The first page holds the header and the schema, which is the same in all journals.
    """
    if not damaged.exists():
        return
    yield from _opened(damaged)
    (page_size,) = fresh.execute("PRAGMA page_size").fetchone()
    ((path,),) = fresh.execute("SELECT file FROM pragma_database_list WHERE name = 'main'")
    copy = damaged.with_name(f"{damaged.name}.copy")
    try:
        shutil.copyfile(damaged, copy)
        with copy.open("r+b") as file:
            page = bytearray(Path(path).read_bytes()[:page_size])
            page[92:96] = b"\0\0\0\0"  # so that its count of pages is not believed
            file.write(page)
        yield from _opened(copy)
    finally:
        discard(copy)


def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.text_factory = lambda text: text.decode(errors="replace")
    try:
        yield connection
    finally:
        connection.close()
        log = Path(f"{path}-wal")
        if ".damaged-" in path.name and log.exists() and not log.stat().st_size:
            log.unlink()  # it was only looked for
            Path(f"{path}-shm").unlink(missing_ok=True)


def _name(connection: sqlite3.Connection) -> str | None:
    try:
        return str(connection.execute("SELECT journal FROM meta").fetchone()[0])
    except (sqlite3.Error, TypeError):
        return None


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[Any, ...] | None]:
    """All rows that can be read, by position; None for each gap and each row that is damaged."""
    at: int | None = 0
    while at is not None:
        try:
            row = connection.execute(f"SELECT {_COLUMNS} {_BEHIND}", (at,)).fetchone()
        except sqlite3.Error:
            yield None
            at = _past(connection, at)
            continue
        if row is None:
            return
        at, lane, id, events, size, _, crc, head, data = row
        fits = isinstance(head, bytes) and isinstance(data, bytes) and size == len(data)
        yield row if fits and crc == crc_of(lane, id, events, head, data) else None


def _past(connection: sqlite3.Connection, at: int) -> int | None:
    """The position from which on rows can be reached again; None: from none."""
    step = 1
    while not _reaches(connection, at + step):
        step *= 2
        if step > _LAST:
            return None
    between = range(at + step // 2 + 1, at + step)
    return between.start + bisect_left(between, True, key=lambda at: _reaches(connection, at))


def _reaches(connection: sqlite3.Connection, at: int) -> bool:
    try:
        connection.execute(f"SELECT position, length(data) {_BEHIND}", (at,)).fetchone()
    except sqlite3.Error:
        return False
    return True


def journal_folder(settings: Settings) -> Path:
    """Where the journals of all processes are."""
    return Path(settings.data_dir) / "journal"


def check_journals(settings: Settings) -> list[tuple[str, str]]:
    """Verify every journal in `data_dir`, also those of living processes; a line for each."""
    folder = journal_folder(settings)
    found = _place(folder)
    if not os.path.isdir(folder):  # what may not be looked at is no folder to us
        return found or [("ok", f"journal: none yet in {folder}")]
    lanes: Counter[str] = Counter()
    paths = sorted(folder.glob("*.sqlite"))
    if not paths and not found:
        found.append(("ok", f"journal: none yet in {folder}"))
    for path in paths:
        try:
            verdict, waiting = _check(path)
        except sqlite3.Error as exc:
            verdict, waiting = str(exc), Counter()
        level = "ok" if verdict == "ok" else "fail"
        events = f"{(many := waiting.total())} event{'' if many == 1 else 's'} waiting"
        found.append((level, f"journal {path}: {verdict}, {events}"))
        lanes += waiting
    found += unregistered("journal", lanes, "event", settings)
    damaged = sorted(folder.glob("*.damaged-*[0-9x]"))  # each may have its log beside it
    found += [("warn", f"journal {path}: quarantined as damaged") for path in damaged]
    return found


def _place(folder: Path) -> list[tuple[str, str]]:
    """What keeps the service from writing there."""
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        whose = "" if there == folder else f"made, as {there} can't be "
        remedy = "set data_dir, or the rights of that folder"
        return [("fail", f"journal {folder}: can't be {whose}written: {remedy}")]
    if shutil.disk_usage(there).free < MIN_FREE_BYTES:
        return [("fail", f"journal {folder}: less than 64 MiB of disk is free: free some")]
    return []


def left_behind(settings: Settings) -> list[tuple[str, str]]:
    """What waits in journals of this `data_dir` although `mirror` is another one by now."""
    found = []
    for path in sorted(journal_folder(settings).glob("*.sqlite")):
        with suppress(sqlite3.Error):
            if waiting := _check(path)[1].total():
                text = f"{waiting} events wait here, and mirror is {settings.mirror_kind}"
                how = "run datapipe load with mirror set to journal"
                found.append(("warn", f"journal {path}: {text}: to load them, {how}"))
    return found


def _check(path: Path) -> tuple[str, Counter[str]]:
    """Read-only: `check` may run beside the service that owns the file."""
    for connection in _opened(path):
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        lanes: Counter[str] = Counter()
        damaged = 0
        for row in _rows(connection) if verdict == "ok" else ():
            if row is None:
                damaged += 1
            else:
                lanes[row[1]] += row[3]
        return f"{damaged} batches are damaged" if damaged else verdict, lanes
    raise AssertionError  # `_opened` gives one
