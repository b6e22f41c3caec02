"""The journal: segments in a local SQLite file, flushed to disk before `append` returns.

A dead owner's lock is free, so any living process can adopt its file and load what waits there.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from datapipe.errors import ConfigError, MirrorFull, MirrorUnavailable
from datapipe.mirrors import Found, MirrorState, Neighbours, Run
from datapipe.mirrors.journal_file import (
    ROW_BYTES,
    Damaged,
    JournalFile,
    own_file,
    size_of,
    try_lock,
)
from datapipe.segment import Segment
from datapipe.settings import Settings

MIN_FREE_BYTES = 64 * 1024 * 1024  # on a full disk even DELETE fails, so appends stop before
SEGMENT_MAX_BYTES = 1_048_576

_REMOVED_AT_ONCE = 256  # 1 ms or so: appends wait for the same thread, and clients for them
_LOOK_S = 0.1  # how long the free space of the disk is taken as it was
_T = TypeVar("_T")

log = structlog.stdlib.get_logger("datapipe.mirrors.journal")


class Journal:
    """The mirror of `mirror: journal`: our own file, and those adopted from dead processes."""

    parks = True
    appends_at_once = 1
    gather_s = 0.0
    forgets_for_good = True
    reads_ahead = True
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
        self._unreadable: set[Path] = set()
        self._drained: set[str] = set()
        self._settled: dict[str, int] = {}  # adopted, drained, forgotten: by source, up to where
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
        coming = size_of(segments)
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
                for at in range(0, len(of_source), _REMOVED_AT_ONCE):
                    some = of_source[at : at + _REMOVED_AT_ONCE]
                    await self._run(self._writer, partial(file.remove, some))

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        file = self._files[run.source]
        try:
            return await self._run(self._reader, lambda: file.read(run, max_bytes))
        except Damaged as exc:
            await self._run(self._writer, partial(file.mend, exc.why, exc.seen))
            raise MirrorUnavailable(f"the journal was damaged: {exc}") from exc

    async def recover(self, neighbours: Neighbours) -> Found:
        return Found(runs=await self._run(self._writer, self._recover))

    async def keep(self, neighbours: Neighbours) -> None:
        """Give space back that a burst has taken, bit by bit."""
        for file in list(self._files.values()):
            await self._run(self._writer, file.give_back)

    async def release_all(self) -> None:
        """See `Mirror.release_all`: the end of the process lets go of its files."""

    def _recover(self) -> list[Run]:
        runs: list[Run] = []
        for path in sorted(self._folder.glob("*.sqlite")):
            if any(path == file.path for file in self._files.values()):
                continue
            if (lock := try_lock(path)) is None:
                continue
            try:
                file = JournalFile(path, lock)
            except (ConfigError, sqlite3.Error, OSError) as exc:
                os.close(lock)  # one that can't be read must not keep us from all the others
                if path not in self._unreadable:
                    log.error("journal not adopted", path=str(path), error=str(exc))
                    self._unreadable.add(path)
                continue
            if file.inherited() or self._settled.get(file.source) != file.inherited_until:
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
        return runs

    def drained(self) -> list[str]:
        drained, self._to_tell = self._to_tell, []
        return drained

    async def forgotten(self, source: str) -> None:
        """See `Mirror.forgotten`: only now may another process have an adopted file."""
        file = self._files.get(source)
        if file is None or file is self._own:
            return
        del self._files[source]
        self._told.discard(source)
        self._drained.discard(source)
        self._settled[source] = file.inherited_until
        await self._run(self._writer, file.close)

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
            "journal", self._error is None, self._error, self._bytes(), self._max_bytes,
            self._full(ROW_BYTES),
        )  # fmt: skip

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
        own = own_file(folder)
    except (OSError, sqlite3.OperationalError) as exc:
        raise ConfigError(f"data_dir: no journal can be kept in {folder}: {exc}") from exc
    journal = Journal(settings, folder, own)
    try:
        yield journal
    finally:
        await asyncio.to_thread(journal.close)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
