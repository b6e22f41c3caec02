"""Coordinator: heartbeat, ledger, and recovery of what dead processes left."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import uuid4

import structlog

from datapipe.errors import DatapipeError, LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.mirrors import Mirror, Recovery
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.tasks import background
from datapipe.pipeline.watch import Watch
from datapipe.retry import backoff
from datapipe.sinks import Database, Heartbeat, Table

BEAT_S = 5.0
SILENT_S = 30.0  # six beats missed
_MORE_S = 0.2  # until the next look, where there was more than one look could take
# What a dead process had reserved comes back once its lease has run out: so looks follow each other
# closely after a start or a death, and while there is more than can be had; then less and less.
_FIRST_PAUSE_S = 30.0

log = structlog.stdlib.get_logger("datapipe.pipeline.coordinator")


def new_process_id() -> str:
    """An id for this run of the process; the ledger and the heartbeat bear it."""
    return uuid4().hex


class Coordinator:
    """Recovers at start and regularly; shows that we live, and expires ledger rows, every 5 s.

    It is the mirror's `Membership`: what it needs to know of other processes.
    """

    def __init__(
        self, buffer: Buffer, loader: Loader, sink: Database, process: str, tables: Sequence[Table]
    ) -> None:
        self._buffer = buffer
        self._mirror: Mirror = buffer.mirror
        self._loader = loader
        self._sink = sink
        self._process = process
        self._tables = tables
        self._looked = asyncio.Event()
        self._look_now = asyncio.Event()
        self._watch = Watch(SILENT_S)
        self._unconfirmed: set[str] = set()
        self._dead: set[str] = set()
        self._stuck: set[str] = set()  # lanes that could not be loaded at the last beat
        self._ended = False
        self._expirable: list[str] = []

    @asynccontextmanager
    async def running(self, failed: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """All of it in the background; a task that dies is reported to `failed`."""
        work = [self._recover(), self._prepare(), self._beat(), self._keep()]
        async with background(work, failed):
            yield

    # --- the mirror's Membership ---

    def is_dead(self, process: str) -> bool:
        return self._watch.silent(process)

    def can_load(self, lane: str) -> bool:
        return self._loader.can_load(lane)

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return await self._sink.loaded(segments)

    async def expire_source(self, source: str) -> None:
        await self._sink.expire_source(source, self._process)

    # --- recovery ---

    async def _recover(self) -> None:
        """For ever: take over what waits in the mirror and has no living owner."""
        failures, pause_s = 0, _FIRST_PAUSE_S
        while True:
            self._look_now.clear()
            longest_s = self._mirror.traits.recover_interval_s
            try:
                found = await self._look()
                if found.more or found.left:
                    pause_s = _FIRST_PAUSE_S
                wait_s = min(_MORE_S if found.more else pause_s, longest_s)
                pause_s = min(2 * pause_s, longest_s)
                failures = 0
            except (MirrorUnavailable, SinkUnavailable, LaneBlocked) as exc:
                failures += 1
                wait_s = backoff(failures, 30.0)
                log.warning("recovery failed", error=str(exc), retry_seconds=round(wait_s, 2))
            self._looked.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._look_now.wait()
                pause_s = _FIRST_PAUSE_S

    async def _look(self) -> Recovery:
        """Recover once. Raises: MirrorUnavailable, SinkUnavailable."""
        found = await self._mirror.recover(self)
        self._unconfirmed = found.unconfirmed
        self._buffer.recovered(found)
        if found.lanes or found.unregistered:
            self._loader.hurry({*found.lanes, *found.unregistered})
        return found

    async def looks(self) -> AsyncIterator[None]:
        """Recover until no more is to be had; gives a turn after each look, to load it.

        Whether a process is dead takes half a minute to tell, where its messages are unconfirmed.
        What it had reserved takes as long as the mirror says.
        Raises: MirrorUnavailable, SinkUnavailable, LaneBlocked.
        """
        most = patience = int(SILENT_S / BEAT_S) + 2
        total = 0
        while True:
            found = await self._look()
            self._looked.set()
            yield
            await self._mirror.keep(self)
            before, total = total, self._buffer.total_out
            if found.more and total > before:
                patience = most
                continue
            reserved = self._mirror.state().left
            if not (found.more or reserved or self._unconfirmed) or not (patience or reserved):
                return
            patience = max(0, patience - 1)
            await self.heartbeat()
            await asyncio.sleep(BEAT_S)

    # --- heartbeat ---

    async def _beat(self) -> None:
        """For ever: heartbeat and ledger."""
        failures = 0
        while True:
            try:
                await self.heartbeat()
                failures = 0
            except (SinkUnavailable, LaneBlocked) as exc:
                failures += 1
                if failures == 1 and self._sink.state().up is not False:  # else it was logged
                    log.warning("heartbeat failed", error=str(exc))
                self._watch.lost_sight()
            await asyncio.sleep(backoff(failures, BEAT_S) if failures else BEAT_S)

    async def heartbeat(self, *, ended: bool = False) -> None:
        """Show that we live; expire ledger rows of what the mirror has forgotten; see who died.

        Raises: SinkUnavailable, LaneBlocked: what was to expire is kept for the next time.
        """
        await self._looked.wait()  # what waits here bears on which keys must stay
        self._expirable += self._mirror.expirable()
        sent = len(self._expirable)
        self._ended |= ended  # no beat may follow the last one
        identity = self._mirror.traits.identity
        beat = Heartbeat(self._process, identity, self._buffer.oldest, self._ended)
        beats = await self._sink.heartbeat(beat)
        await self._sink.expire(self._expirable)  # only now: the beat says which keys must stay
        del self._expirable[:sent]
        self._watch.note(beats, asyncio.get_running_loop().time())
        dead = self._watch.dead() - {self._process}
        newly_dead, self._dead = dead - self._dead, dead
        stuck = {name for name, lane in self._buffer.lanes.items() if lane.stuck}
        healed, self._stuck = self._stuck - stuck, stuck
        if newly_dead or healed or any(map(self._watch.silent, self._unconfirmed)):
            self._look_now.set()

    async def deregister(self) -> None:
        """Tell the others that this process beats no more, if the database listens.

        The mirror is settled by then, so nothing that they may load is reserved by us.
        """
        if self._sink.state().up:
            with suppress(DatapipeError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self.heartbeat(ended=True)

    async def _prepare(self) -> None:
        """Make the tables before the first event comes, so that who looks finds them.

        Apart from the heartbeat: a table may be locked for hours by somebody's long SELECT.
        """
        left, failures = list(self._tables), 0
        while left:
            longest_s = _FIRST_PAUSE_S
            for table in list(left):
                try:
                    await self._sink.prepare(table)
                    left.remove(table)
                except LaneBlocked:
                    pass  # its lane will say so, once it has something to load
                except SinkUnavailable as exc:
                    if exc.everywhere:  # the sink has logged it
                        longest_s = BEAT_S
                        break
            failures += 1
            await asyncio.sleep(backoff(failures, longest_s))

    async def _keep(self) -> None:
        """For ever: have the mirror keep what waits; apart, for a beat must not wait for it.

        And give memory back once a burst is over: glibc's allocator keeps what was freed (after a
        million events in batches 110 MB stay resident without this, 67 with it).
        """
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        trimmed_at = 0
        while True:
            await asyncio.sleep(BEAT_S)
            if self._buffer.total_out != trimmed_at and not self._buffer.in_memory:
                trim(0)
                trimmed_at = self._buffer.total_out
            try:
                if await self._mirror.keep(self):
                    self._look_now.set()
            except MirrorUnavailable as exc:
                log.warning("mirror not kept", error=exc.detail)
