"""A mirror as a third party would write it: a file for each segment, in a folder for each process.

A process owns its folder by a lock, which the kernel frees when it dies: then whoever sees the
folder takes it over, and loads what lies there from where it lies.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from datapipe.errors import MirrorFull, MirrorUnavailable
from datapipe.events.segment import Segment, decode_head, encode_head, restored
from datapipe.mirrors import Appended, Membership, MirrorPlugin, MirrorState, Traits
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.store import Found, Removal, Run
from datapipe.settings import Settings

_T = TypeVar("_T")


class ToyStore:
    """Segments as files; their names are their positions."""

    reads_ahead = True
    forgets_for_good = True

    def __init__(self, folder: Path, process: str, max_bytes: int) -> None:
        self.traits = Traits(batch_bytes=65_536, identity=process, recover_interval_s=30.0)
        self._folder = folder
        self._max_bytes = max_bytes
        self._bytes = 0
        self._error: str | None = None
        self._positions = itertools.count(1)
        self._locks: dict[str, int] = {}  # by source: ours, and those taken over
        self._take_over(process)

    async def append(self, segments: Sequence[Segment]) -> Appended:
        if self._bytes >= self._max_bytes:
            return Appended((), MirrorFull("no room for more (max_bytes)"))
        stored: list[Segment] = []
        for segment in segments:
            segment.source, segment.position = self.traits.identity, next(self._positions)
            try:
                await self._run(partial(self._write, segment))
            except MirrorUnavailable as exc:
                return Appended(stored, exc)
            stored.append(segment)
            self._bytes += len(segment.data)
        return Appended(stored)

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        return await self._run(lambda: self._read(run, max_bytes))

    async def remove(self, removals: Sequence[Removal]) -> None:
        for removal in removals:
            path = self._path(removal.source, removal.position)
            await self._run(partial(path.unlink, missing_ok=True))
            self._bytes -= removal.bytes

    async def recover(self, membership: Membership) -> Found:
        return await self._run(self._recover)

    async def keep(self, membership: Membership) -> bool:
        return False

    async def release(self) -> None:
        return

    def state(self) -> MirrorState:
        return MirrorState("toy", self._error is None, self._error, self._bytes, self._max_bytes)

    def close(self) -> None:
        for lock in self._locks.values():
            os.close(lock)

    async def _run(self, call: Callable[[], _T]) -> _T:
        try:
            result = await asyncio.to_thread(call)
        except OSError as exc:
            self._error = str(exc)
            raise MirrorUnavailable(f"the folder can't be used: {exc}") from exc
        self._error = None
        return result

    def _path(self, source: str, position: int) -> Path:
        return self._folder / source / f"{position:012}"

    def _write(self, segment: Segment) -> None:
        """On disk when this returns, under its name or not at all."""
        path = self._path(segment.source, segment.position)
        facts = json.dumps([segment.id, segment.lane, segment.events, segment.created_at])
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            file.write(facts.encode() + b"\n" + encode_head(segment) + b"\n" + segment.data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        _sync(path.parent)

    def _load(self, path: Path) -> Segment:
        facts, head, data = path.read_bytes().split(b"\n", 2)
        id, lane, events, created_at = json.loads(facts)
        segment = restored(
            decode_head(head), data, id=id, lane=lane, events=events, created_at=created_at
        )
        segment.source, segment.position = path.parent.name, int(path.name)
        return segment

    def _read(self, run: Run, max_bytes: int) -> list[Segment]:
        read: list[Segment] = []
        size = 0
        for path in self._files(run.source):
            if run.after < int(path.name) <= run.until:
                segment = self._load(path)
                if segment.lane != run.lane:
                    continue
                size += segment.bytes
                if read and size > max_bytes:
                    break
                read.append(segment)
        return read

    def _files(self, source: str) -> list[Path]:
        return sorted(each for each in (self._folder / source).iterdir() if each.name.isdecimal())

    def _recover(self) -> Found:
        found = Found()
        for folder in sorted(self._folder.iterdir()):
            if folder.name not in self._locks and self._take_over(folder.name):
                for path in self._files(folder.name):
                    segment = self._load(path)
                    self._bytes += len(segment.data)
                    found.runs.append(Run.of(segment))
        return found

    def _take_over(self, source: str) -> bool:
        """Make the folder ours, unless its owner lives."""
        (self._folder / source).mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / source / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._locks[source] = lock
        return True


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class ToyPlugin(MirrorPlugin):
    """What the entry point names. `mirror_options` may say where the files lie."""

    folder: str = "toy"  # within `data_dir`

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[BufferedMirror]:
        folder = Path(settings.data_dir) / self.folder
        store = ToyStore(folder, process, settings.journal_max_bytes)
        try:
            yield BufferedMirror(store, settings.buffer_max_bytes)
        finally:
            store.close()
