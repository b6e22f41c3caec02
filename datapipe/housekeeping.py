"""Housekeeping: heartbeat, ledger, adoption of what dead processes left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from uuid import uuid4

import structlog

from datapipe.backoff import Backoff
from datapipe.buffer import Buffer
from datapipe.errors import LaneBlocked, MirrorUnavailable, SinkUnavailable
from datapipe.sinks import Heartbeat, Sink, Table

BEAT_S = 5.0
RECOVER_S = 30.0

log = structlog.stdlib.get_logger("datapipe.housekeeping")


def new_process_id() -> str:
    """An id for this run of the process; the ledger and the heartbeat bear it."""
    return uuid4().hex


class Housekeeper:
    """Recovers at start and every 30 s; shows that we live, and tidies up, every 5 s."""

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
        self._removed: list[str] = []
        self._drained: set[str] = set()

    async def recover(self) -> None:
        """For ever: take over what waits in the mirror and has no living owner."""
        while True:
            try:
                if await self._buffer.recover():
                    self._recovered([n for n, lane in self._buffer.lanes.items() if lane.runs])
            except MirrorUnavailable as exc:
                log.warning("recovery failed", error=exc.detail)
            self._looked.set()
            await asyncio.sleep(RECOVER_S)

    async def beat(self) -> None:
        """For ever: heartbeat and ledger."""
        await self._looked.wait()  # what waits here bears on which keys must stay
        failures, backoff = 0, Backoff(BEAT_S)
        while True:
            try:
                await self._prepare()
                await self.tidy()
                failures = 0
            except (SinkUnavailable, LaneBlocked):
                failures += 1  # the sink has told it; loads ask again, and so does this
            await asyncio.sleep(backoff.seconds(failures) if failures else BEAT_S)

    async def _prepare(self) -> None:
        """Make the tables before the first event comes, so that who looks finds them."""
        for table in self._tables:
            with suppress(LaneBlocked):  # its lane will tell, once it has something to load
                await self._sink.prepare(table)

    async def tidy(self) -> None:
        """One heartbeat; drop ledger rows of what the mirror has forgotten.

        Raises: SinkUnavailable, LaneBlocked: what was to go is kept for the next time.
        """
        self._removed += self._buffer.removed()
        self._drained.update(self._buffer.mirror.drained())
        lanes = self._buffer.lanes.values()
        oldest = min((lane.oldest for lane in lanes if lane.oldest is not None), default=None)
        sent = len(self._removed)
        beat = Heartbeat(self._process, self._buffer.mirror.identity, oldest)
        await self._sink.keep_house(beat, self._removed)
        del self._removed[:sent]
        for source in list(self._drained):
            await self._sink.forget_source(source, self._process)
            self._drained.discard(source)
