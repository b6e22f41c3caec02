"""The journal: segments in a local SQLite file, flushed to disk before `append` returns.

One process owns one file, by `flock` on a lock file beside it that is never unlinked (to unlink a
lock file is to let two processes hold two locks of one name). A dead owner's lock is free, so any
living process can adopt its file and load what waits there.

WAL with `synchronous=FULL`: one flush of the log per append. Source: SQLite documentation,
"Write-Ahead Logging" and "PRAGMA synchronous". All writing is done by one thread, all reading of
parked segments by another with its own connection, in short transactions: a long SELECT would keep
the log from being reset.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import structlog

from datapipe.errors import ConfigError, MirrorFull, MirrorUnavailable
from datapipe.events import Column
from datapipe.mirrors import Found, MirrorState, Neighbours, Run
from datapipe.segment import Segment, decode_head, encode_head
from datapipe.settings import Settings

MIN_FREE_BYTES = 64 * 1024 * 1024  # on a full disk even DELETE fails, so appends stop before
SEGMENT_MAX_BYTES = 1_048_576

_FORMAT = 1
_SCHEMA = """
CREATE TABLE meta (journal TEXT NOT NULL);
CREATE TABLE segments (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    lane TEXT NOT NULL, id TEXT NOT NULL, events INTEGER NOT NULL, bytes INTEGER NOT NULL,
    created_at REAL NOT NULL, crc INTEGER NOT NULL, head BLOB NOT NULL, data BLOB NOT NULL);
CREATE INDEX waiting ON segments (lane, position, events, bytes, created_at);
"""
_ROW_BYTES = 256  # what a segment takes beside its rows
_LOOK_S = 0.1  # how long the free space of the disk is taken as it was
_VACUUM_PAGES = 512  # given back to the file system in one go, at most
_T = TypeVar("_T")
log = structlog.stdlib.get_logger("datapipe.mirrors.journal")


class JournalFile:
    """One SQLite file and its lock. Every method blocks: call it in the thread that fits."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        try:
            self._open()
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError):
                raise  # a full or read-only disk: nothing is wrong with the file
            self._set_aside(exc)
            self._open()

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
        (last,) = self._write.execute("SELECT max(position) FROM segments").fetchone()
        self._inherited_until: int = last or 0
        self._read = self._connect()
        self.measure()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)

    def _set_aside(self, why: Exception) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        for suffix in ("", "-wal", "-shm"):
            file = self.path.with_name(self.path.name + suffix)
            if file.exists():
                file.rename(f"{file}.damaged-{stamp}")
        log.error(
            "journal damaged", path=str(self.path), kept=f"{self.path}.damaged-{stamp}",
            error=str(why),
        )  # fmt: skip

    def measure(self) -> None:
        """Set `used_bytes`: what the waiting segments take, which free pages don't."""
        (size, count) = self._write.execute(
            "SELECT coalesce(sum(bytes), 0), count(*) FROM segments"
        ).fetchone()
        self.used_bytes: int = size + count * _ROW_BYTES

    def append(self, segments: Sequence[Segment]) -> None:
        """One transaction, on disk when this returns. Raises: sqlite3.Error.

        One segment goes in one statement: each call into SQLite hands the interpreter to other
        threads and has to wait for it again.
        """
        if len(segments) == 1:
            self._insert(segments[0])
        else:
            self._write.execute("BEGIN IMMEDIATE")
            try:
                for segment in segments:
                    self._insert(segment)
                self._write.execute("COMMIT")
            except BaseException:
                self._rollback()
                raise
        self.used_bytes += _size_of(segments)

    def _insert(self, segment: Segment) -> None:
        head = encode_head(segment)
        cursor = self._write.execute(
            "INSERT INTO segments (lane, id, events, bytes, created_at, crc, head, data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                segment.lane, segment.id, segment.events, len(segment.data), segment.created_at,
                _crc(head, segment.data), head, segment.data,
            ),
        )  # fmt: skip
        segment.source, segment.position = self.source, cursor.lastrowid or 0

    def remove(self, segments: Sequence[Segment]) -> None:
        """One transaction, on disk when this returns. Raises: sqlite3.Error."""
        self._write.execute("BEGIN IMMEDIATE")
        try:
            removed = self._write.executemany(
                "DELETE FROM segments WHERE position = ?", [(s.position,) for s in segments]
            ).rowcount
            self._write.execute("COMMIT")
        except BaseException:
            self._rollback()
            raise
        if removed == len(segments):
            self.used_bytes -= _size_of(segments)
        else:
            self.measure()

    def give_back(self) -> None:
        """Shorten the file by a bounded number of free pages, if there are many."""
        (free,) = self._write.execute("PRAGMA freelist_count").fetchone()
        if free > _VACUUM_PAGES:
            pages = max(_VACUUM_PAGES, free // 4)
            self._write.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()

    def _rollback(self) -> None:
        if self._write.in_transaction:
            self._write.execute("ROLLBACK")

    def inherited(self) -> list[Run]:
        """What earlier owners left here and still waits, a run per lane; reads the index alone."""
        rows = self._write.execute(
            "SELECT lane, min(position), max(position), count(*), sum(events), sum(bytes),"
            " min(created_at) FROM segments WHERE position <= ? GROUP BY lane",
            (self._inherited_until,),
        )
        return [
            Run(lane, self.source, first - 1, last, count, events, size, oldest)
            for lane, first, last, count, events, size, oldest in rows
        ]

    def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """The first segments of a run, in the reading thread. Raises: sqlite3.Error."""
        where = (run.lane, run.after, run.until)
        last, size = 0, 0
        for position, length in self._read.execute(
            "SELECT position, bytes FROM segments"
            " WHERE lane = ? AND position > ? AND position <= ? ORDER BY position",
            where,
        ):
            if last and size + length > max_bytes:
                break
            last, size = position, size + length
        rows = self._read.execute(
            "SELECT position, id, events, created_at, crc, head, data FROM segments"
            " WHERE lane = ? AND position > ? AND position <= ? ORDER BY position",
            (run.lane, run.after, last),
        ).fetchall()
        return [self._segment(run.lane, row) for row in rows]

    def _segment(self, lane: str, row: tuple[Any, ...]) -> Segment:
        position, id, events, created_at, crc, head_text, data = row
        if crc != _crc(head_text, data):
            raise sqlite3.DatabaseError(f"segment {id} at position {position} is damaged")
        head = decode_head(head_text)
        return Segment(
            lane, [Column(*c) for c in head.columns], data, events, head.parts,
            id=id, created_at=created_at, source=self.source, position=position,
        )  # fmt: skip

    def close(self) -> None:
        (last,) = self._write.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
        self._read.close()
        self._write.close()
        if not last:  # never used: a command that only looked leaves nothing behind
            self.path.unlink()
        os.close(self._lock)


class Journal:
    """The mirror of `mirror: journal`: our own file, and those adopted from dead processes."""

    parks = True
    appends_at_once = 1
    gather_s = 0.0
    forgets_for_good = True
    recover_interval_s = 30.0
    given_up = False

    def __init__(self, settings: Settings, folder: Path, own: JournalFile) -> None:
        self.segment_max_bytes = min(SEGMENT_MAX_BYTES, settings.load_trigger_bytes)
        self._folder = folder
        self._max_bytes = settings.journal_max_bytes
        self._own = own
        self._files = {own.source: own}
        self.identity = own.source
        self._told: set[str] = set()
        self._drained: set[str] = set()
        self._to_tell: list[str] = []
        self._writer = ThreadPoolExecutor(1, "journal-writer")
        self._reader = ThreadPoolExecutor(1, "journal-reader")
        self._error: str | None = None
        self._others_bytes: int = 0
        self._others_seen = 0.0
        self._looked_at = 0.0
        self._why_full: str | None = None

    def queue_of(self, lane: str) -> str:
        return ""

    async def append(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        await self._run(self._writer, lambda: self._append(segments))
        return segments

    def _append(self, segments: Sequence[Segment]) -> None:
        coming = _size_of(segments)
        now = time.monotonic()
        if self._why_full or now - self._looked_at > _LOOK_S:  # a look at the disk is a call
            self._looked_at = now
            self._why_full = self._full(coming)
        elif self._bytes() + coming > self._max_bytes:
            self._why_full = self._full(coming)
        if self._why_full is not None:
            raise MirrorFull(self._why_full)
        self._own.append(segments)

    def _full(self, coming: int) -> str | None:
        """Why so many bytes more can't be stored."""
        if self._bytes() + coming > self._max_bytes:
            return "the journal is full (journal_max_bytes)"
        disk = os.statvfs(self._folder)
        if disk.f_bavail * disk.f_frsize < MIN_FREE_BYTES + coming:
            return "less than 64 MiB of disk is free for the journal"
        return None

    async def remove(self, segments: Sequence[Segment]) -> None:
        by_source: dict[str, list[Segment]] = {}
        for segment in segments:
            by_source.setdefault(segment.source, []).append(segment)
        for source, of_source in by_source.items():
            if file := self._files.get(source):
                await self._run(self._writer, partial(file.remove, of_source))

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        file = self._files[run.source]
        return await self._run(self._reader, lambda: file.read(run, max_bytes))

    async def recover(self, neighbours: Neighbours) -> Found:
        return Found(runs=await self._run(self._writer, self._recover))

    async def keep(self, neighbours: Neighbours) -> None:
        """Give space back that a burst has taken, bit by bit."""
        for file in list(self._files.values()):
            await self._run(self._writer, file.give_back)

    def _recover(self) -> list[Run]:
        runs: list[Run] = []
        for path in sorted(self._folder.glob("*.sqlite")):
            if any(path == file.path for file in self._files.values()):
                continue
            if (lock := _try_lock(path)) is None:
                continue
            file = JournalFile(path, lock)
            if file.inherited():
                self._files[file.source] = file
            else:
                file.close()
        for file in list(self._files.values()):
            left = file.inherited()
            if file.source not in self._told:
                self._told.add(file.source)
                runs += left
            if not left and file.source not in self._drained:
                self._drained.add(file.source)
                self._to_tell.append(file.source)
                if file is not self._own:
                    del self._files[file.source]
                    self._told.discard(file.source)
                    self._drained.discard(file.source)
                    file.close()
        return runs

    def drained(self) -> list[str]:
        drained, self._to_tell = self._to_tell, []
        return drained

    async def _run(self, thread: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        try:
            result = await asyncio.get_running_loop().run_in_executor(thread, call)
        except (sqlite3.Error, OSError) as exc:
            self._error = str(exc)
            raise MirrorUnavailable(f"the journal does not work: {exc}") from exc
        self._error = None
        return result

    def _bytes(self) -> int:
        """All journals in the folder: ours as used, those of other processes as files."""
        if time.monotonic() - self._others_seen > 1:
            ours = {file.path for file in list(self._files.values())}
            self._others_bytes = sum(
                _size(path) for path in self._folder.glob("*.sqlite") if path not in ours
            )
            self._others_seen = time.monotonic()
        return self._others_bytes + sum(file.used_bytes for file in list(self._files.values()))

    def state(self) -> MirrorState:
        return MirrorState(
            "journal",
            self._error is None,
            self._error,
            self._bytes(),
            self._max_bytes,
            self._full(_ROW_BYTES),
        )

    def close(self) -> None:
        self._writer.shutdown()
        self._reader.shutdown()
        for file in self._files.values():
            file.close()


@asynccontextmanager
async def open_journal(settings: Settings) -> AsyncIterator[Journal]:
    """Open the first journal in `data_dir` that no living process owns; make it if need be.

    Raises: ConfigError: the folder can't be written.
    """
    folder = Path(settings.data_dir) / "journal"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = _own_file(folder)
    except (OSError, sqlite3.OperationalError) as exc:
        raise ConfigError(f"data_dir: no journal can be kept in {folder}: {exc}") from exc
    journal = Journal(settings, folder, own)
    try:
        yield journal
    finally:
        await asyncio.to_thread(journal.close)


def _own_file(folder: Path) -> JournalFile:
    for number in itertools.count():
        path = folder / f"{number}.sqlite"
        if (lock := _try_lock(path)) is not None:
            return JournalFile(path, lock)
    raise AssertionError  # count() never ends


def _try_lock(path: Path) -> int | None:
    """The lock's file descriptor, or None: its owner lives."""
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _size_of(segments: Sequence[Segment]) -> int:
    return sum([len(segment.data) + _ROW_BYTES for segment in segments])


def _crc(head: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(head))


def check_journals(settings: Settings) -> list[tuple[str, str]]:
    """Verify every journal in `data_dir`, also those of living processes; a line for each."""
    folder = Path(settings.data_dir) / "journal"
    if not folder.is_dir():
        return [("ok", f"journal: none yet in {folder}")]
    found = [] if os.access(folder, os.W_OK) else [("fail", f"journal {folder}: can't be written")]
    for path in sorted(folder.glob("*.sqlite")):
        try:
            # read-only: `check` may run beside the service that owns the file
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
            try:
                (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                events = connection.execute("SELECT coalesce(sum(events), 0) FROM segments")
                (waiting,) = events.fetchone()
            finally:
                connection.close()
        except sqlite3.Error as exc:
            verdict, waiting = str(exc), 0
        level = "ok" if verdict == "ok" else "fail"
        found.append((level, f"journal {path}: {verdict}, {waiting} events waiting"))
    damaged = sorted(folder.glob("*.damaged-*"))
    found += [("warn", f"journal {path}: set aside as damaged") for path in damaged]
    return found
