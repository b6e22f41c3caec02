"""The journal: segments in a local SQLite file, flushed to disk before `append` returns.

A dead owner's lock is free, so any living process can adopt its file and load what waits there.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from datapipe.errors import ConfigError, LaneBlocked, MirrorFull, MirrorUnavailable, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors import Appended, Membership, Mirror, MirrorPlugin, MirrorState, Traits
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.journal.file import ROW_BYTES, JournalFile, open_file, own_file, size_of
from datapipe.mirrors.journal.salvage import (
    MIN_FREE_BYTES,
    check_journals,
    is_damage,
    journal_folder,
)
from datapipe.mirrors.store import Found, Removal, Run
from datapipe.settings import Settings

SEGMENT_MAX_BYTES = 1_048_576

_REMOVED_AT_ONCE = 256  # 1 ms or so: appends wait for the same thread, and clients for them
RECOVER_INTERVAL_S = 30.0
_LOOK_S = 0.1  # how long the free space of the disk is taken as it was
_LOOK_AT_OTHERS_S = 1.0
_T = TypeVar("_T")

log = structlog.stdlib.get_logger("datapipe.mirrors.journal.mirror")


class Journal:
    """The store of `mirror: journal`: our own file, and those adopted from dead processes."""

    forgets_for_good = True
    reads_ahead = True

    def __init__(self, settings: Settings, folder: Path, own: JournalFile) -> None:
        self.traits = Traits(
            batch_bytes=min(SEGMENT_MAX_BYTES, settings.load_trigger_bytes),
            identity=own.source, recover_interval_s=RECOVER_INTERVAL_S,
        )  # fmt: skip
        self._folder = folder
        self._max_bytes = settings.journal_max_bytes
        self._files = {own.source: own}
        self._recovered: set[str] = set()  # by source
        self._unreadable: set[Path] = set()
        self._settled: dict[str, int] = {}  # adopted, drained, expired: by source, up to where
        self._writer = ThreadPoolExecutor(1, "journal-writer")
        self._reader = ThreadPoolExecutor(1, "journal-reader")
        self._error: str | None = None
        self._others_bytes: int = 0
        self._others_seen = 0.0
        self._looked_at = 0.0
        self._free_bytes = 0
        self._look_under_way: Future[None] | None = None

    @property
    def _own(self) -> JournalFile:
        return self._files[self.traits.identity]

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Store.append`."""
        try:
            # asked here, not in the writing thread, which would have to wait for its turn once more
            if not self._own.in_place():
                await self._run(self._writer, self._repair_places)
            await self._run(self._writer, lambda: self._append(segments))
        except MirrorUnavailable as exc:
            return Appended((), exc)
        return Appended(segments)

    def _append(self, segments: Sequence[Segment]) -> None:
        coming = size_of(segments)
        if self._full(coming) or time.monotonic() - self._looked_at > _LOOK_S:
            self._look()  # a look at the disk is a call
        if (why := self._full(coming)) is not None:
            raise MirrorFull(why)
        self._in_file(self.traits.identity, lambda file: file.append(segments))

    def _full(self, coming: int) -> str | None:
        """Why so many bytes more can't be stored, as of the last look."""
        if self._bytes() + coming > self._max_bytes:
            return "the journal is full (journal_max_bytes)"
        if self._free_bytes < MIN_FREE_BYTES + coming:
            return "less than 64 MiB of disk is free for the journal"
        return None

    def _look(self) -> None:
        """In the writing thread: how much room the disk and the other processes leave us."""
        now = self._looked_at = time.monotonic()
        disk = os.statvfs(self._folder)
        self._free_bytes = disk.f_bavail * disk.f_frsize
        if now - self._others_seen > _LOOK_AT_OTHERS_S:
            ours = {file.path for file in list(self._files.values())}
            others = (path for path in self._folder.glob("*.sqlite") if path not in ours)
            self._others_bytes = sum(map(_size, others))
            self._others_seen = now

    def _in_file(self, source: str, call: Callable[[JournalFile], _T]) -> _T:
        """In the writing thread: do it; on a damaged file, once more on what it is made into."""
        file = self._files[source]
        try:
            return call(file)
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            self._remake(file, str(exc))
            return call(self._files[source])

    def _remake(self, file: JournalFile, why: str) -> None:
        """In the writing thread: make a journal anew of what can be read of it, once."""
        if self._files.get(file.source) is file:
            self._files[file.source] = file.remade(why)
            self._reader.submit(file.disconnect)  # after what is being read from it

    def _repair_places(self) -> None:
        """In the writing thread: make anew whatever was removed, replaced or emptied."""
        for file in list(self._files.values()):
            if not file.in_place():
                self._remake(file, f"{file.path} was removed, replaced or emptied from outside")

    async def remove(self, removals: Sequence[Removal]) -> None:
        by_source: dict[str, list[Removal]] = {}
        for removal in removals:
            by_source.setdefault(removal.source, []).append(removal)
        for source, of_source in by_source.items():
            for at in range(0, len(of_source), _REMOVED_AT_ONCE):
                some = of_source[at : at + _REMOVED_AT_ONCE]
                await self._run(self._writer, partial(self._remove, source, some))

    def _remove(self, source: str, removals: Sequence[Removal]) -> None:
        if source in self._files:  # else it was drained
            self._in_file(source, lambda file: file.remove(removals))

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        file = self._files.get(run.source)
        if file is None:  # it was damaged, and nothing of it is left
            return []
        try:
            return await self._run(self._reader, lambda: file.read(run, max_bytes))
        except MirrorUnavailable as exc:
            if isinstance(exc.__cause__, sqlite3.Error) and is_damage(exc.__cause__):
                await self._run(self._writer, partial(self._remake, file, str(exc.__cause__)))
            raise

    async def recover(self, membership: Membership) -> Found:
        """See `Store.recover`."""
        return Found(runs=await self._run(self._writer, self._recover))

    async def keep(self, membership: Membership) -> bool:
        """Give back, bit by bit, the space that a burst took; release files that are drained."""
        await self._run(self._writer, self._repair_places)
        for file in list(self._files.values()):
            await self._run(self._writer, file.release_free_pages)
            if file.source not in self._recovered:
                continue
            is_drained = partial(self._in_file, file.source, JournalFile.is_drained)
            if await self._run(self._writer, is_drained):
                await self._expire(file, membership)
        return False

    async def _expire(self, file: JournalFile, membership: Membership) -> None:
        """Nothing of an earlier owner waits in this file any more: the ledger may forget it.

        Only then may another process have an adopted file.
        """
        if self._settled.get(file.source) == file.inherited_until:
            return
        try:
            await membership.expire_source(file.source)
        except (SinkUnavailable, LaneBlocked):
            return  # the sink has logged it; tried again with the next call
        if self._files.get(file.source) is not file:  # made anew meanwhile
            return
        self._settled[file.source] = file.inherited_until
        if file is not self._own:
            del self._files[file.source]
            self._recovered.discard(file.source)
            await self._run(self._writer, file.close)

    async def release(self) -> None:
        """See `Store.release`: the end of the process lets go of its files."""

    def _recover(self) -> list[Run]:
        runs: list[Run] = []
        for path in sorted(self._folder.glob("*.sqlite")):
            if any(path == file.path for file in list(self._files.values())):
                continue
            try:
                self._adopt(path)
            except (ConfigError, sqlite3.Error, OSError) as exc:
                # one that can't be read must not hold up the others
                if path not in self._unreadable:
                    log.error("journal not adopted", path=str(path), error=str(exc))
                    self._unreadable.add(path)
        failed: sqlite3.Error | OSError | None = None
        for file in list(self._files.values()):
            if file.source in self._recovered:
                continue
            try:
                runs += self._in_file(file.source, JournalFile.inherited)
            except (sqlite3.Error, OSError) as exc:
                failed = exc  # the others first; the next look asks again
            else:
                self._recovered.add(file.source)
        if failed is not None and not runs:
            raise failed
        return runs

    def _adopt(self, path: Path) -> None:
        """Take a journal over, unless its owner lives or nothing is to be done for it."""
        if (file := open_file(path)) is None:
            return
        try:
            settled = self._settled.get(file.source) == file.inherited_until
            wanted = not (settled and file.is_drained())
        except BaseException:
            file.close()
            raise
        if wanted:
            self._files[file.source] = file
        else:
            file.close()

    async def _run(self, thread: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        try:
            result = await asyncio.get_running_loop().run_in_executor(thread, call)
        except (sqlite3.Error, OSError) as exc:
            raise MirrorUnavailable(self._failed(exc)) from exc
        self._error = None
        return result

    def _failed(self, exc: sqlite3.Error | OSError) -> str:
        """Note, and return, what is wrong."""
        how = "was damaged" if isinstance(exc, sqlite3.Error) and is_damage(exc) else "fails"
        self._error = f"the journal {how}: {exc}"
        return self._error

    def _bytes(self) -> int:
        """All journals in the folder: ours as used, those of other processes as files."""
        return self._others_bytes + sum(file.used_bytes for file in list(self._files.values()))

    def state(self) -> MirrorState:
        """As of the last look; it is asked for on the event loop, which no disk may hold up."""
        waiting = self._look_under_way is not None and not self._look_under_way.done()
        if not waiting and time.monotonic() - self._looked_at > _LOOK_S:
            with suppress(RuntimeError):  # closed
                self._look_under_way = self._writer.submit(self._look_meanwhile)
        return MirrorState(
            "journal", self._error is None, self._error, self._bytes(), self._max_bytes,
            self._full(ROW_BYTES),
        )  # fmt: skip

    def _look_meanwhile(self) -> None:
        try:
            self._repair_places()
            self._look()
        except (sqlite3.Error, OSError) as exc:
            self._failed(exc)

    def close(self) -> None:
        self._writer.shutdown()
        self._reader.shutdown()
        for file in self._files.values():
            file.close()


@asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[Journal]:
    """Open the first journal in `data_dir` that no living process owns; make it if need be.

    Raises: ConfigError: the folder can't be written.
    """
    folder = journal_folder(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(settings, folder, own_file(folder))
        journal._look()
    except (OSError, sqlite3.OperationalError) as exc:
        raise ConfigError(f"data_dir: no journal can be kept in {folder}: {exc}") from exc
    try:
        yield journal
    finally:
        await asyncio.to_thread(journal.close)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class JournalPlugin(MirrorPlugin):
    def kept_in(self, settings: Settings) -> Path:
        """See `Plugin.kept_in`."""
        return journal_folder(settings)

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[Mirror]:
        async with open_store(settings) as store:
            yield BufferedMirror(store, settings.buffer_max_bytes)

    async def check(self, settings: Settings) -> list[tuple[str, str]]:
        return await asyncio.to_thread(check_journals, settings)
