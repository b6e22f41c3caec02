"""One journal file: segments in SQLite, and the lock that says whose it is.

One process owns one file, by `flock` on a lock file beside it that is never unlinked (to unlink a
lock file is to let two processes hold two locks of one name).

WAL with `synchronous=FULL`: one flush of the log per append. Source: SQLite documentation,
"Write-Ahead Logging" and "PRAGMA synchronous". All writing is done by one thread, all reading of
parked segments by another with its own connection, in short transactions: a long SELECT would keep
the log from being reset.

An open file can be written though its name was removed, and nobody would find again what was
written. So each append first checks that file, log and lock are where they were.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog

from datapipe.errors import ConfigError
from datapipe.events.segment import (
    SEGMENT_OVERHEAD_BYTES,
    SEGMENTS_AT_ONCE,
    Segment,
    decode_head,
    encode_head,
    restored,
)
from datapipe.mirrors.journal.salvage import (
    crc_of,
    discard,
    is_damage,
    openings,
    quarantine,
    rename,
    rescue,
)
from datapipe.mirrors.store import Removal, Run

_FORMAT = 1
_SCHEMA = """
CREATE TABLE meta (journal TEXT NOT NULL);
CREATE TABLE segments (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    lane TEXT NOT NULL, id TEXT NOT NULL, events INTEGER NOT NULL, bytes INTEGER NOT NULL,
    created_at REAL NOT NULL, crc INTEGER NOT NULL, head BLOB NOT NULL, data BLOB NOT NULL);
CREATE INDEX waiting ON segments (lane, position, events, bytes, created_at);
"""
ROW_BYTES = 256  # what a segment takes beside its rows
_VACUUM_PAGES = 512  # given back to the file system in one go, at most
log = structlog.stdlib.get_logger("datapipe.mirrors.journal.mirror")


class JournalFile:
    """One SQLite file and its lock.

    Every method but `in_place` blocks: call it in the writing thread, but for `read`.

    Attributes:
        source: the journal's id, which its segments bear.
        inherited_until: the last position that an earlier owner may have used.
        used_bytes: what the waiting segments take, which free pages don't.
    """

    def __init__(self, path: Path, lock: int) -> None:
        """Raises: sqlite3.Error, ConfigError, OSError: it can't be opened."""
        self.path = path
        self.lock = lock
        self._connections: list[sqlite3.Connection] = []
        self._filled: set[str] = set()  # of its places, what must not be found empty
        try:
            self._open()
            self.inherited_until = self._last_position()
        except BaseException:
            self.disconnect()
            raise
        places = (str(path), self._log, str(path.with_suffix(".lock")))
        self._places = [(each, _identity(os.stat(each))) for each in places if os.path.exists(each)]

    def _open(self) -> None:
        new = not self.path.exists() or self.path.stat().st_size == 0
        self._write = self._connect()
        if new:  # large pages: a batch goes in faster, and a small append costs little more
            self._write.execute("PRAGMA page_size=16384")
            self._write.execute("PRAGMA auto_vacuum=INCREMENTAL")
        self._write.execute("PRAGMA journal_mode=WAL")
        self._write.execute("PRAGMA synchronous=FULL")
        self._write.execute("PRAGMA fullfsync=1")  # macOS: there fsync alone reaches no platter
        self._write.execute("PRAGMA journal_size_limit=16777216")
        self._write.execute("PRAGMA wal_autocheckpoint=500")  # pages: 8 MiB
        # some builds overwrite deleted pages with zeros, which doubles the writing
        self._write.execute("PRAGMA secure_delete=OFF")
        version = self._write.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._write.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={_FORMAT};COMMIT")
            self._write.execute("INSERT INTO meta VALUES (?)", (uuid4().hex,))
        elif version != _FORMAT:
            raise ConfigError(f"the journal {self.path} was written by a newer datapipe")
        self._read = self._connect()
        self._measure()

    def _connect(self) -> sqlite3.Connection:
        self._connections.append(
            sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        )
        return self._connections[-1]

    def _measure(self) -> None:
        self.source: str
        self.used_bytes: int
        (self.source,) = self._write.execute("SELECT journal FROM meta").fetchone()
        (self.used_bytes,) = self._write.execute(
            f"SELECT coalesce(sum(bytes + {ROW_BYTES}), 0) FROM segments"
        ).fetchone()

    def _last_position(self) -> int:
        sql = "SELECT coalesce(max(position), 0) FROM segments"
        return int(self._write.execute(sql).fetchone()[0])

    @property
    def _log(self) -> str:
        return f"{self.path}-wal"

    # --- replaced, removed or damaged ---

    def in_place(self) -> bool:
        """Whether file, log and lock are where they were, and were not emptied.

        May be asked in any thread, where a no can be premature: ask again in the writing one. It
        does not read the disk: the kernel has the inodes of open files in memory.
        """
        try:
            for place, identity in self._places:
                seen = os.stat(place)
                if _identity(seen) != identity or (not seen.st_size and place in self._filled):
                    return False
                if seen.st_size and place is self._places[0][0]:
                    self._filled.add(place)  # the file is never emptied by us, the log is
        except OSError:
            return False
        return True

    def remade(self, why: str) -> JournalFile:
        """The journal, made anew of what our connections still see, or else of what lies there.

        This one is to be disconnected then. Raises: OSError, sqlite3.Error: it can't be made now,
        and this one is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path, lock = self._place()
        try:
            fresh = _made_of(path, lock, why, self)
        except BaseException:
            if lock != self.lock:
                os.close(lock)
            raise
        if lock != self.lock:
            os.close(self.lock)
        return fresh

    def _place(self) -> tuple[Path, int]:
        """Where to make it anew, and the lock: here, unless somebody else has this place now."""
        lock_path, identity = self._places[-1]
        if os.path.exists(lock_path) and _identity(os.stat(lock_path)) == identity:
            return self.path, self.lock
        if (lock := try_lock(self.path)) is not None:
            return self.path, lock
        for path in _numbered(self.path.parent):
            if not path.exists() and (lock := try_lock(path)) is not None:
                return path, lock
        raise AssertionError  # there is no last number

    def disconnect(self) -> None:
        while self._connections:
            self._connections.pop().close()

    # --- segments ---

    def append(self, segments: Sequence[Segment]) -> None:
        """One transaction, on disk when this returns. Raises: sqlite3.Error.

        One segment goes in one statement: each call into SQLite hands the interpreter to other
        threads and has to wait for it again.
        """
        if len(segments) == 1:
            self._insert(segments[0])
        else:
            with self._write:
                self._write.execute("BEGIN IMMEDIATE")
                for segment in segments:
                    self._insert(segment)
        self._filled.add(self._log)
        self.used_bytes += size_of(segments)

    def _insert(self, segment: Segment) -> None:
        head = encode_head(segment)
        cursor = self._write.execute(
            "INSERT INTO segments (lane, id, events, bytes, created_at, crc, head, data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                segment.lane, segment.id, segment.events, len(segment.data), segment.created_at,
                crc_of(segment.lane, segment.id, segment.events, head, segment.data), head,
                segment.data,
            ),
        )  # fmt: skip
        segment.source, segment.position = self.source, cursor.lastrowid or 0

    def remove(self, removals: Sequence[Removal]) -> None:
        """On disk when this returns. Raises: sqlite3.Error.

        Args: removals: at most 256, as the oldest SQLite takes 999 values in a statement.
        """
        marks = ", ".join("?" * len(removals))
        removed = self._write.execute(
            f"DELETE FROM segments WHERE position IN ({marks})",
            [each.position for each in removals],
        ).rowcount
        if removed == len(removals):
            self.used_bytes -= sum([each.bytes + ROW_BYTES for each in removals])
        else:
            self._measure()

    def release_free_pages(self) -> None:
        """Shorten the file by a bounded number of free pages, if there are many."""
        (free,) = self._write.execute("PRAGMA freelist_count").fetchone()
        if free > _VACUUM_PAGES:
            self._filled.discard(self._log)
            # a script, because `execute` would take one step, which frees one page; and so far
            # that stands in the log alone
            self._write.executescript(
                f"PRAGMA incremental_vacuum({_VACUUM_PAGES}); PRAGMA wal_checkpoint(TRUNCATE)"
            )

    def is_drained(self) -> bool:
        """Whether nothing of what earlier owners left waits here any more."""
        sql = "SELECT NOT EXISTS (SELECT 1 FROM segments WHERE position <= ?)"
        return bool(self._write.execute(sql, (self.inherited_until,)).fetchone()[0])

    def inherited(self) -> list[Run]:
        """What earlier owners left here and still waits, a run per lane; reads the index alone."""
        rows = self._write.execute(
            "SELECT lane, min(position), max(position), count(*), sum(events), sum(bytes),"
            " min(created_at) FROM segments WHERE position <= ? GROUP BY lane",
            (self.inherited_until,),
        ).fetchall()
        return [
            Run(lane, self.source, first - 1, last, count, events, size, oldest)
            for lane, first, last, count, events, size, oldest in rows
        ]

    def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """The first segments of a run, in the reading thread. Raises: sqlite3.Error."""
        last, size = 0, 0
        for position, length in self._read.execute(
            "SELECT position, bytes FROM segments"
            " WHERE lane = ? AND position > ? AND position <= ? ORDER BY position LIMIT ?",
            (run.lane, run.after, run.until, SEGMENTS_AT_ONCE),
        ):
            size += length + SEGMENT_OVERHEAD_BYTES
            if last and size > max_bytes:
                break
            last = position
        rows = self._read.execute(
            "SELECT position, id, events, created_at, crc, head, data FROM segments"
            " WHERE lane = ? AND position > ? AND position <= ? ORDER BY position",
            (run.lane, run.after, last),
        ).fetchall()
        return [self._segment(run.lane, row) for row in rows]

    def _segment(self, lane: str, row: tuple[Any, ...]) -> Segment:
        position, id, events, created_at, crc, head_text, data = row
        if crc != crc_of(lane, id, events, head_text, data):
            raise sqlite3.DatabaseError(f"batch {id} at position {position} is damaged")
        segment = restored(
            decode_head(head_text), data, id=id, lane=lane, events=events, created_at=created_at
        )
        segment.source, segment.position = self.source, position
        return segment

    def close(self) -> None:
        never_used = False
        with suppress(sqlite3.Error):  # damaged: the next owner repairs it
            ((last,),) = self._write.execute("SELECT max(seq) FROM sqlite_sequence")
            never_used = last is None and self.in_place()
        self.disconnect()  # SQLite leaves a log beside a file that is gone before
        if never_used:  # a command that only looked leaves nothing behind
            self.path.unlink(missing_ok=True)
        os.close(self.lock)


def own_file(folder: Path) -> JournalFile:
    """The first journal that nobody has locked; another user's is skipped.

    Raises: OSError, sqlite3.OperationalError: none can be had in this folder.
    """
    for path in _numbered(folder):
        try:
            if (file := open_file(path)) is not None:
                return file
        except (PermissionError, sqlite3.OperationalError):
            if not _closed_to_us(path):
                raise
    raise AssertionError  # there is no last number


def _numbered(folder: Path) -> Iterator[Path]:
    return (folder / f"{number}.sqlite" for number in itertools.count())


def open_file(path: Path) -> JournalFile | None:
    """The journal, or None: its owner lives.

    Raises: ConfigError, OSError, sqlite3.Error: it can't be opened.
    """
    if (lock := try_lock(path)) is None:
        return None
    try:
        try:
            return JournalFile(path, lock)
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            return _made_of(path, lock, str(exc))
    except BaseException:
        os.close(lock)
        raise


def _made_of(path: Path, lock: int, why: str, old: JournalFile | None = None) -> JournalFile:
    """A new journal of what can be read: by the old one's connection, or of what lies there.

    What lies there is quarantined, never deleted.
    Raises: OSError, sqlite3.Error: it can't be made now, and there is none.
    """
    kept = quarantine(path)
    fresh: JournalFile | None = None
    try:
        fresh = JournalFile(path, lock)
        seen = [old._write] if old else []
        sources = itertools.chain(seen, openings(kept, fresh._write))
        rows, gaps = rescue(sources, fresh._write, old.source if old else None)
        fresh._measure()
        fresh.inherited_until = old.inherited_until if old else fresh._last_position()
    except BaseException:
        if fresh is not None:
            fresh.disconnect()
        discard(path)
        if old is None:  # the next start tries again
            rename(kept, path)
        raise
    log.error(
        "journal damaged", path=str(path), kept=str(kept) if kept.exists() else None, error=why,
        segments_rescued=rows, gaps=gaps,
    )  # fmt: skip
    return fresh


def _closed_to_us(path: Path) -> bool:
    """Whether the file, or its lock, is there and may not be written by this user."""
    both = (path, path.with_suffix(".lock"))
    return any(each.exists() and not os.access(each, os.R_OK | os.W_OK) for each in both)


def try_lock(path: Path) -> int | None:
    """The lock's file descriptor, or None: its owner lives."""
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _identity(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_dev, seen.st_ino


def size_of(segments: Sequence[Segment]) -> int:
    return sum([len(segment.data) + ROW_BYTES for segment in segments])
