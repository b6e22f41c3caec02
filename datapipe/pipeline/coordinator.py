"""Coordinator: heartbeat, ledger, and recovery of what dead processes left."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar
from uuid import uuid4

from datapipe.errors import DatapipeError, LaneBlocked, SinkUnavailable
from datapipe.health import Health
from datapipe.mirrors import Mirror, Recovery
from datapipe.pipeline.allocator import release_memory
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.tasks import Failed, background, repeat
from datapipe.pipeline.watch import Watch
from datapipe.retry import backoff
from datapipe.sinks import Database, Heartbeat, Mark, Table

BEAT_S = 5.0
SILENT_S = 30.0  # six beats missed
_BLOCKED_S = 30.0  # the longest wait until a table that alone can't be made is tried again
_TABLES_S = 60.0  # until the next look at what is too old
_ROUND_S = 5.0  # of removals: then health says that they work
_RELEASE_S = 2.0
_FEW = 10_000  # events in memory
_MORE_S = 0.2  # until the next look, where there was more than one look could take
# What a dead process had reserved comes back once its lease has run out: so looks follow each other
# closely after a start or a death, and while there is more than one look can take; then they become
# rarer.
_FIRST_PAUSE_S = 30.0

_T = TypeVar("_T")


def new_process_id() -> str:
    """An id for this run of the process, stored in the ledger and with the heartbeat."""
    return uuid4().hex


class Coordinator:
    """Recovers at start and regularly; sends a heartbeat and expires ledger rows every 5 s.

    It is the mirror's `Membership`: what it needs to know of other processes.

    Args:
        tables: to be made at the start; any other is made at its lane's first load.
        kept: those with a partition or a retention.
    Attributes:
        parts: the health of all that it does for ever.
        host: the machine of this process and its number there, for people.
    """

    def __init__(
        self,
        buffer: Buffer,
        loader: Loader,
        sink: Database,
        process: str,
        tables: Sequence[Table] = (),
        kept: Sequence[Table] = (),
    ) -> None:
        self._buffer = buffer
        self._mirror: Mirror = buffer.mirror
        self._loader = loader
        self._sink = sink
        self._process = process
        self.host = f"{socket.gethostname()}:{os.getpid()}"
        self._tables = tables
        self._kept = kept
        names = ("recovery", "heartbeat", "upkeep", "tables")
        self.parts = tuple(Health(name) for name in names)
        self._pause_s = _FIRST_PAUSE_S
        self._looked = asyncio.Event()
        self._look_now = asyncio.Event()
        self._watch = Watch(SILENT_S)
        self._dead: set[str] = set()
        self._stuck: set[str] = set()  # lanes that could not be loaded at the last beat
        self._ended = False
        self._expirable: list[str] = []

    @asynccontextmanager
    async def running(self, failed: Failed) -> AsyncIterator[None]:
        """All of it in the background; a task that dies is reported to `failed`."""
        recovery, heartbeat, upkeep, tables = self.parts
        work = [
            repeat(self._recover, recovery, "recovery failed", 30.0, self._pause),
            repeat(self._beat, heartbeat, "heartbeat failed", BEAT_S),
            repeat(self._keep, upkeep, "mirror not kept", BEAT_S),
            repeat(self._keep_tables, tables, "tables not kept", _TABLES_S),
            self._prepare(),
            self._release_memory(),
        ]
        async with background(work, failed):
            yield

    # --- the mirror's Membership ---

    def is_dead(self, process: str) -> bool:
        return self._watch.is_dead(process)

    def can_load(self, lane: str) -> bool:
        return self._loader.can_load(lane)

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return await self._sink.loaded(segments)

    async def expire_source(self, source: str) -> None:
        await self._sink.expire_source(source, self._process)

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        await self._sink.expire_lanes(source, before)

    async def database_time(self) -> float:
        return await self._sink.now()

    async def find_mark(self, prefix: str) -> Mark | None:
        return await self._sink.find_mark(prefix)

    async def mark(self, prefix: str) -> Mark:
        return await self._sink.mark(prefix)

    async def confirm_mark(self, prefix: str, id: str) -> None:
        await self._sink.confirm_mark(prefix, id)

    # --- recovery ---

    async def _recover(self) -> float:
        """Take over what waits in the mirror without a living owner; returns the next pause."""
        self._look_now.clear()
        longest_s = self._mirror.traits.recover_interval_s
        found = await self._look()
        if found.more or found.left:
            self._pause_s = _FIRST_PAUSE_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, longest_s)
        return min(_MORE_S if found.more else pause_s, longest_s)

    async def _pause(self, pause_s: float) -> None:
        """Wait until the next look is due, or there is a reason for one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._look_now.wait()
            self._pause_s = _FIRST_PAUSE_S

    async def _look(self) -> Recovery:
        """Recover once. Raises: MirrorUnavailable, SinkUnavailable, LaneBlocked."""
        try:
            found = await self._mirror.recover(self)
        finally:
            self._looked.set()
        self._buffer.recovered(found)
        self._loader.hurry({*found.lanes, *found.unregistered, *found.due})
        return found

    async def looks(self) -> AsyncIterator[None]:
        """Recover until nothing more can be had; yields after each look, to load what it found.

        Where owners are unconfirmed, it takes half a minute to find out whether they are dead; what
        a dead process had reserved takes as long as the mirror says.
        Raises: MirrorUnavailable, SinkUnavailable, LaneBlocked.
        """
        most = patience = int(SILENT_S / BEAT_S) + 2
        while True:
            found, before = await self._look(), self._buffer.total_out
            yield
            await self._mirror.keep(self)
            reserved = self._mirror.state().left
            held = self._mirror.traits.shared and self._buffer.waiting  # by others, or they were
            if found.more and self._buffer.total_out > before:
                patience = most
            elif reserved or (patience > 0 and (found.more or found.unconfirmed or held)):
                patience -= 1
                await self.heartbeat()
                await asyncio.sleep(BEAT_S)
            else:
                return

    # --- heartbeat ---

    async def _beat(self) -> float:
        try:
            await self.heartbeat()
        except DatapipeError:
            self._watch.lost_sight()
            raise
        return BEAT_S

    async def heartbeat(self, *, ended: bool = False) -> None:
        """Send a heartbeat; expire ledger rows of what has left the mirror; notice who died.

        Raises: SinkUnavailable, LaneBlocked: what was to expire is kept for the next time.
        """
        await self._looked.wait()  # which keys must be kept depends on what waits here
        self._expirable += self._mirror.expirable()
        sent = len(self._expirable)
        self._ended |= ended  # no beat may follow the last one
        traits, oldest = self._mirror.traits, self._buffer.oldest
        oldest_s = None if oldest is None else max(time.time() - oldest, 0.0)
        beat = Heartbeat(
            self._process, traits.identity, oldest_s, self._ended, self.host, traits.group
        )
        beats = await self._sink.heartbeat(beat)
        await self._sink.expire(self._expirable)  # after the heartbeat: it says which keys to keep
        del self._expirable[:sent]
        self._watch.note(beats, asyncio.get_running_loop().time())
        dead = self._watch.dead() - {self._process}
        stuck = {name for name, lane in self._buffer.lanes.items() if lane.stuck}
        if dead - self._dead or self._stuck - stuck:  # a process died, or a lane has healed
            self._look_now.set()
        self._dead, self._stuck = dead, stuck

    @property
    def living(self) -> dict[str, str]:
        """The host of each other process that lives and shares our mirror, by its id."""
        group = self._mirror.traits.group
        living = self._watch.living().items()
        return {
            id: beat.host
            for id, beat in living
            if group and beat.group == group and id != self._process
        }

    async def deregister(self) -> None:
        """Let the others know that this process has ended, if the database is up.

        The mirror is settled by then, so we hold no reservation on anything that they may load.
        """
        if self._sink.state().up:
            with suppress(DatapipeError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self.heartbeat(ended=True)

    async def _prepare(self) -> None:
        """Make tables before their first events come, so that people find them.

        Not part of the heartbeat: a long SELECT may lock a table for hours. Each wait for that lock
        holds up all who come after us, so such a table is tried less often.
        """
        left, failures = deque(self._tables), 0
        while left:
            try:
                await self._sink.prepare(left[0])
                left.popleft()
            except (SinkUnavailable, LaneBlocked) as exc:  # logged by the sink, or at a load
                left.rotate(-1)
                failures += 1
                everywhere = isinstance(exc, SinkUnavailable) and exc.everywhere
                await asyncio.sleep(backoff(failures, BEAT_S if everywhere else _BLOCKED_S))

    # --- upkeep ---

    async def _keep(self) -> float:
        """Have the mirror keep what waits. A task of its own: no heartbeat may wait for it."""
        self._buffer.removed.take(self._buffer.removed_bytes)
        traits = self._mirror.traits
        try:
            if await self._mirror.keep(self):
                self._look_now.set()
        finally:
            if traits.shared:  # other processes' events may be due
                self._buffer.wake.set()
        return min(BEAT_S, traits.keep_interval_s)

    async def _keep_tables(self) -> float:
        """Make partitions ahead; remove what is too old, of all tables in turn, by small steps.

        Between two steps others have as much time as a step took. A lock that somebody holds is no
        failure: later it may be free.
        """
        failed: list[LaneBlocked] = []

        async def tried(step: Awaitable[_T]) -> _T | None:
            try:
                return await step
            except SinkUnavailable as exc:
                if exc.everywhere:
                    raise
            except LaneBlocked as exc:
                failed.append(exc)
            return None

        for table in self._kept:
            await tried(self._sink.make_ahead(table))
        now = asyncio.get_running_loop().time
        until, left = now() + _ROUND_S, deque(self._kept)
        while left and now() < until:
            began = now()
            if await tried(self._sink.remove_expired(left[0])):
                left.rotate(-1)
            else:
                left.popleft()
            await asyncio.sleep(now() - began)
        if failed:
            raise failed[0]
        return 0.0 if left else _TABLES_S

    async def _release_memory(self) -> None:
        """Give back what is free, again and again; where much waits it is soon needed again."""
        while True:
            await asyncio.sleep(_RELEASE_S)
            if self._buffer.in_memory < _FEW:
                await asyncio.to_thread(release_memory)
