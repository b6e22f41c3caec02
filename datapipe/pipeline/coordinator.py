"""Housekeeping: heartbeat, ledger, adoption of what dead processes left."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from uuid import uuid4

import structlog

from datapipe.errors import LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.mirrors import Found
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.retry import backoff
from datapipe.pipeline.watch import Watch
from datapipe.sinks import Heartbeat, Sink, Table

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


class Housekeeper:
    """Recovers at start and regularly; shows that we live, and tidies up, every 5 s.

    It is the mirror's `Neighbours`: what it needs to know of other processes.
    """

    def __init__(
        self,
        buffer: Buffer,
        sink: Sink,
        process: str,
        recovered: Callable[[Iterable[str]], None],
        tables: Sequence[Table] = (),
    ) -> None:
        self._buffer = buffer
        self._sink = sink
        self._process = process
        self._recovered = recovered
        self._tables = tables
        self._looked = asyncio.Event()
        self._look_now = asyncio.Event()
        self._watch = Watch(SILENT_S)
        self._suspects: set[str] = set()
        self._dead: set[str] = set()
        self._stuck: set[str] = set()  # lanes that could not be loaded at the last beat
        self._ended = False
        self._removed: list[str] = []
        self._drained: set[str] = set()

    # --- the mirror's Neighbours ---

    def silent(self, process: str) -> bool:
        return self._watch.silent(process)

    def loads(self, lane: str) -> bool:
        known = any(table.name == lane for table in self._tables)
        return known and not self._buffer.lane(lane).stuck

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return await self._sink.loaded(segments)

    # --- recovery ---

    async def recover(self) -> None:
        """For ever: take over what waits in the mirror and has no living owner."""
        failures, pause_s = 0, _FIRST_PAUSE_S
        while True:
            self._look_now.clear()
            try:
                found = await self.look()
                if found.more or found.left:
                    pause_s = _FIRST_PAUSE_S
                wait_s = _MORE_S if found.more else pause_s
                wait_s = min(wait_s, self._buffer.mirror.recover_interval_s)
                pause_s = min(2 * pause_s, self._buffer.mirror.recover_interval_s)
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

    async def look(self) -> Found:
        """Recover once. Raises: MirrorUnavailable, SinkUnavailable."""
        found = await self._buffer.recover(self)
        self._suspects = found.suspects
        if lanes := {*(run.lane for run in found.runs), *(s.lane for s in found.segments)}:
            self._recovered(lanes)
        return found

    async def looks(self) -> AsyncIterator[None]:
        """Recover until no more is to be had; gives a turn after each look, to load it.

        Whether a process is dead takes half a minute to tell, where its messages are suspect. What
        it had reserved takes as long as the mirror tells.
        Raises: MirrorUnavailable, SinkUnavailable, LaneBlocked.
        """
        most = patience = int(SILENT_S / BEAT_S) + 2
        went = 0
        while True:
            found = await self.look()
            self._looked.set()
            yield
            before, went = went, sum(lane.went for lane in self._buffer.lanes.values())
            if found.more and went > before:
                patience = most
                continue
            reserved = self._buffer.mirror.state().left
            if not (found.more or reserved or self._suspects) or not (patience or reserved):
                return
            patience = max(0, patience - 1)
            await self.tidy()
            await asyncio.sleep(BEAT_S)

    # --- heartbeat ---

    async def beat(self) -> None:
        """For ever: heartbeat and ledger."""
        failures = 0
        while True:
            try:
                await self.tidy()
                failures = 0
            except (SinkUnavailable, LaneBlocked) as exc:
                failures += 1
                if failures == 1 and self._sink.state().up is not False:  # else it was told
                    log.warning("heartbeat failed", error=str(exc))
                self._watch.lost_sight()
            await asyncio.sleep(backoff(failures, BEAT_S) if failures else BEAT_S)

    async def prepare(self) -> None:
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
                    pass  # its lane will tell, once it has something to load
                except SinkUnavailable as exc:
                    if exc.everywhere:  # the sink has told it
                        longest_s = BEAT_S
                        break
            failures += 1
            await asyncio.sleep(backoff(failures, longest_s))

    async def tidy(self, *, ended: bool = False) -> None:
        """One heartbeat; drop ledger rows of what the mirror has forgotten; watch the others.

        Raises: SinkUnavailable, LaneBlocked: what was to go is kept for the next time.
        """
        await self._looked.wait()  # what waits here bears on which keys must stay
        self._removed += self._buffer.removed()
        self._drained.update(self._buffer.mirror.drained())
        lanes = self._buffer.lanes.values()
        oldest = min((lane.oldest for lane in lanes if lane.oldest is not None), default=None)
        sent = len(self._removed)
        self._ended |= ended  # no beat may follow the last one
        beat = Heartbeat(self._process, self._buffer.mirror.identity, oldest, self._ended)
        beats = await self._sink.keep_house(beat, self._removed)
        del self._removed[:sent]
        for source in list(self._drained):
            await self._sink.forget_source(source, self._process)
            await self._buffer.mirror.forgotten(source)
            self._drained.discard(source)
        self._watch.note(beats, asyncio.get_running_loop().time())
        dead = self._watch.dead() - {self._process}
        newly_dead, self._dead = dead - self._dead, dead
        stuck = {name for name, lane in self._buffer.lanes.items() if lane.stuck}
        healed, self._stuck = self._stuck - stuck, stuck
        given_up = self._buffer.mirror.given_up
        if newly_dead or healed or given_up or any(map(self._watch.silent, self._suspects)):
            self._look_now.set()

    async def keep(self) -> None:
        """For ever: have the mirror keep what waits; apart, for a beat must not wait for it.

        And give memory back once a burst is over: glibc's allocator keeps what was freed (after a
        million events in batches 110 MB stay resident without this, 67 with it).
        """
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        trimmed_at = 0
        while True:
            await asyncio.sleep(BEAT_S)
            went = sum([lane.went for lane in self._buffer.lanes.values()])
            if went != trimmed_at and not self._buffer.memory_bytes:
                trim(0)
                trimmed_at = went
            try:
                await self._buffer.mirror.keep(self)
            except MirrorUnavailable as exc:
                log.warning("mirror not kept", error=exc.detail)
