"""One journal file: segments in SQLite, and the lock that says whose it is.

One process owns one file, by `flock` on a lock file beside it that is never unlinked (to unlink a
lock file is to let two processes hold two locks of one name).

WAL with `synchronous=FULL`: one flush of the log per append. Source: SQLite documentation,
"Write-Ahead Logging" and "PRAGMA synchronous". All writing is done by one thread, all reading of
parked segments by another with its own connection, in short transactions: a long SELECT would keep
the log from being reset.

An open file can be written though its name is gone, and nobody would find again what was written.
So each append begins by a look whether file, log and lock are where they were.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import structlog

from datapipe.errors import ConfigError
from datapipe.events.segment import (
    SEGMENT_OVERHEAD_BYTES,
    SEGMENTS_AT_ONCE,
    Segment,
    decode_head,
    encode_head,
)
from datapipe.mirrors.buffered import Run
from datapipe.mirrors.journal.salvage import crc_of, is_damage, openings, rescue, set_aside

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
_T = TypeVar("_T")
log = structlog.stdlib.get_logger("datapipe.mirrors.journal.mirror")


class Damaged(Exception):
    """A row or a page can't be read: `mend` the file with these."""

    def __init__(self, why: Exception, seen: sqlite3.Connection) -> None:
        super().__init__(str(why))
        self.why = why
        self.seen = seen


class JournalFile:
    """One SQLite file and its lock.

    Every method but `in_place` blocks: call it in the thread that fits.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._reading = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self._places: list[tuple[str, tuple[int, int]]] = []
        self._filled: set[str] = set()  # of these, what must not be found empty
        try:
            self._open()
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            self._renew(exc)
        (self.inherited_until,) = self._write.execute(
            "SELECT coalesce(max(position), 0) FROM segments"
        ).fetchone()

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
        (self.source,) = self._write.execute("SELECT journal FROM meta").fetchone()
        self._read = self._connect()
        self.measure()
        places = (self._name, self._log, str(self.path.with_suffix(".lock")))
        self._places = [(each, _identity(os.stat(each))) for each in places if os.path.exists(each)]
        self._filled.clear()

    @property
    def _name(self) -> str:
        return str(self.path)

    @property
    def _log(self) -> str:
        return f"{self.path}-wal"

    def in_place(self) -> bool:
        """Whether file, log and lock are where they were, and were not emptied.

        May be asked in any thread, where a no can be too early: ask again in the writing one. It
        takes no disk: the system has at hand what is open.
        """
        try:
            for place, identity in self._places:
                seen = os.stat(place)
                if seen.st_ino != identity[1] or seen.st_dev != identity[0]:
                    return False
                if not seen.st_size and place in self._filled:
                    return False
                if seen.st_size and place is self._places[0][0]:
                    self._filled.add(place)  # the file is never emptied by us, the log is
        except OSError:
            return False
        return True

    def renewed(self) -> JournalFile:
        """The journal, made anew of what our connections still see; this one is closed.

        In the writing thread, once it is not in place. Raises: OSError, sqlite3.Error: it can't be
        made now, and this one is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path, lock = self._place()
        kept = set_aside(path)
        try:
            fresh = JournalFile(path, lock)
            rows, gaps = fresh._take_over(self._write, kept, self.source)
        except BaseException:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            if lock != self._lock:
                os.close(lock)
            raise
        fresh.inherited_until = self.inherited_until
        with self._reading:
            self._disconnect()
        if lock != self._lock:
            os.close(self._lock)
        log.error(
            "journal damaged", path=str(path), kept=str(kept) if kept.exists() else None,
            error=f"{self.path} was removed, replaced or emptied from outside",
            segments_rescued=rows, gaps=gaps,
        )  # fmt: skip
        return fresh

    def _place(self) -> tuple[Path, int]:
        """Where to make it anew, and the lock: here, unless somebody else has this place now."""
        lock_path, identity = self._places[-1]
        if os.path.exists(lock_path) and _identity(os.stat(lock_path)) == identity:
            return self.path, self._lock
        others = (self.path.with_name(f"{number}.sqlite") for number in itertools.count())
        for path in itertools.chain([self.path], others):
            if path.exists() and path != self.path:
                continue
            if (lock := try_lock(path)) is not None:
                return path, lock
        raise AssertionError  # count() never ends

    def _take_over(self, seen_by: sqlite3.Connection, kept: Path, name: str) -> tuple[int, int]:
        """Fill this new file; see `rescue`."""
        sources = openings(kept, self._write) if kept.exists() else iter(())
        told = rescue(itertools.chain([seen_by], sources), self._write, name)
        (self.source,) = self._write.execute("SELECT journal FROM meta").fetchone()
        self.measure()
        return told

    def _connect(self) -> sqlite3.Connection:
        self._connections.append(
            sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        )
        return self._connections[-1]

    def _disconnect(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def mend(self, why: Exception, seen: sqlite3.Connection) -> None:
        """Make the file anew of what can be read, unless that was done since `seen` was used.

        Call it in the writing thread.
        """
        with self._reading:
            if seen in (self._write, self._read):
                self._renew(why)

    def _renew(self, why: Exception) -> None:
        name = getattr(self, "source", None)
        self._disconnect()  # before: to close is to delete the log by its name
        damaged = set_aside(self.path)
        self._open()
        rows, gaps = rescue(openings(damaged, self._write), self._write, name)
        (self.source,) = self._write.execute("SELECT journal FROM meta").fetchone()
        self.measure()
        log.error(
            "journal damaged", path=str(self.path), kept=str(damaged), error=str(why),
            segments_rescued=rows, gaps=gaps,
        )  # fmt: skip

    def _mending(self, call: Callable[[], _T]) -> _T:
        """In the writing thread: do it; on a damaged file, once more on what it is made into."""
        seen = self._write
        try:
            return call()
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            self.mend(exc, seen)
            return call()

    def measure(self) -> None:
        """Set `used_bytes`: what the waiting segments take, which free pages don't."""
        (size, count) = self._write.execute(
            "SELECT coalesce(sum(bytes), 0), count(*) FROM segments"
        ).fetchone()
        self.used_bytes: int = size + count * ROW_BYTES

    def append(self, segments: Sequence[Segment]) -> None:
        """One transaction, on disk when this returns. Raises: sqlite3.Error.

        One segment goes in one statement: each call into SQLite hands the interpreter to other
        threads and has to wait for it again.
        """
        self._mending(lambda: self._append(segments))
        self._filled.add(self._log)
        self.used_bytes += size_of(segments)

    def _append(self, segments: Sequence[Segment]) -> None:
        if len(segments) == 1:
            self._insert(segments[0])
        else:
            with self._write:
                self._write.execute("BEGIN IMMEDIATE")
                for segment in segments:
                    self._insert(segment)

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

    def remove(self, segments: Sequence[Segment]) -> None:
        """One transaction, on disk when this returns. Raises: sqlite3.Error."""
        self._mending(lambda: self._remove(segments))

    def _remove(self, segments: Sequence[Segment]) -> None:
        with self._write:
            self._write.execute("BEGIN IMMEDIATE")
            removed = self._write.executemany(
                "DELETE FROM segments WHERE position = ?", [(s.position,) for s in segments]
            ).rowcount
        if removed == len(segments):
            self.used_bytes -= size_of(segments)
        else:
            self.measure()

    def release_free_pages(self) -> None:
        """Shorten the file by a bounded number of free pages, if there are many."""
        (free,) = self._write.execute("PRAGMA freelist_count").fetchone()
        if free > _VACUUM_PAGES:
            pages = _VACUUM_PAGES
            self._filled.discard(self._log)
            # a script, because `execute` would take one step, which frees one page; and so far
            # that stands in the log alone
            self._write.executescript(
                f"PRAGMA incremental_vacuum({pages}); PRAGMA wal_checkpoint(TRUNCATE)"
            )

    def is_drained(self) -> bool:
        """Whether nothing of what earlier owners left waits here any more."""
        sql = "SELECT EXISTS (SELECT 1 FROM segments WHERE position <= ?)"
        (left,) = self._mending(
            lambda: self._write.execute(sql, (self.inherited_until,)).fetchone()
        )
        return not left

    def inherited(self) -> list[Run]:
        """What earlier owners left here and still waits, a run per lane; reads the index alone."""
        sql = (
            "SELECT lane, min(position), max(position), count(*), sum(events), sum(bytes),"
            " min(created_at) FROM segments WHERE position <= ? GROUP BY lane"
        )
        until = (self.inherited_until,)
        rows = self._mending(lambda: self._write.execute(sql, until).fetchall())
        return [
            Run(lane, self.source, first - 1, last, count, events, size, oldest)
            for lane, first, last, count, events, size, oldest in rows
        ]

    def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """The first segments of a run, in the reading thread.

        Raises: sqlite3.Error; Damaged: the file must be mended first.
        """
        with self._reading:
            try:
                return self._read_from(self._read, run, max_bytes)
            except sqlite3.DatabaseError as exc:
                if is_damage(exc):
                    raise Damaged(exc, self._read) from exc
                raise

    def _read_from(self, connection: sqlite3.Connection, run: Run, max_bytes: int) -> list[Segment]:
        where = (run.lane, run.after, run.until)
        last, size = 0, 0
        for position, length in connection.execute(
            "SELECT position, bytes FROM segments"
            " WHERE lane = ? AND position > ? AND position <= ? ORDER BY position LIMIT ?",
            (*where, SEGMENTS_AT_ONCE),
        ):
            size += length + SEGMENT_OVERHEAD_BYTES
            if last and size > max_bytes:
                break
            last = position
        rows = connection.execute(
            "SELECT position, id, events, created_at, crc, head, data FROM segments"
            " WHERE lane = ? AND position > ? AND position <= ? ORDER BY position",
            (run.lane, run.after, last),
        ).fetchall()
        return [self._segment(run.lane, row) for row in rows]

    def _segment(self, lane: str, row: tuple[Any, ...]) -> Segment:
        position, id, events, created_at, crc, head_text, data = row
        if crc != crc_of(lane, id, events, head_text, data):
            raise sqlite3.DatabaseError(f"segment {id} at position {position} is damaged")
        head = decode_head(head_text)
        return Segment(
            lane, head.columns, data, events, head.parts, neutral=head.neutral,
            id=id, created_at=created_at, source=self.source, position=position,
        )  # fmt: skip

    def close(self) -> None:
        try:
            ((last,),) = self._write.execute("SELECT max(seq) FROM sqlite_sequence")
            if last is None and self.in_place():  # never used: a command that only looked
                self.path.unlink()  # leaves nothing behind
        except sqlite3.Error:
            pass  # damaged: the next owner mends it
        self._disconnect()
        os.close(self._lock)


def own_file(folder: Path) -> JournalFile:
    """The first journal that nobody holds; what belongs to another user is passed over.

    Raises: OSError, sqlite3.OperationalError: none can be had in this folder.
    """
    for number in itertools.count():
        path = folder / f"{number}.sqlite"
        try:
            if (file := open_file(path)) is not None:
                return file
        except (PermissionError, sqlite3.OperationalError):
            if not _closed_to_us(path):
                raise
    raise AssertionError  # count() never ends


def open_file(path: Path) -> JournalFile | None:
    """The journal, or None: its owner lives.

    Raises: ConfigError, OSError, sqlite3.Error: it can't be opened.
    """
    if (lock := try_lock(path)) is None:
        return None
    try:
        return JournalFile(path, lock)
    except BaseException:
        os.close(lock)
        raise


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
