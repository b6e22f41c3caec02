"""One input to one service: read ahead, deliver some pieces at a time, remember how far it is.

Lanes go their own ways. While one is full its pieces wait in memory, and the others go on. Once
nothing but such pieces is held, the full lanes are set aside: the rest of the input is read for the
others, and then, in another pass, from where it stopped for those. (What can be read only once,
such as standard input, waits instead.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from datapipe.cli.send.client import Client, Outcome
from datapipe.cli.send.cut import Block, Mark, Piece, blocks
from datapipe.cli.send.items import Elements, Lines, array_start
from datapipe.cli.send.source import BrokenInput, Source
from datapipe.cli.send.state import RefusedFile, State, StateFile
from datapipe.errors import DatapipeError, Reason

_MOST_HELD = 12  # pieces beside those that are on their way
_SAVE_S = 1.0

_LABELS = {reason.code: reason.label for reason in reversed(Reason)}


@dataclass
class Totals:
    """Of all inputs of a run. `refused` is by reason, as metrics name it."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def any(self) -> bool:
        """Whether anything was answered."""
        return bool(self.accepted or self.refused)

    def add(self, outcome: Outcome) -> None:
        self.accepted += outcome.accepted
        told = Counter(_LABELS.get(each.code or 0, "other") for each in outcome.refusals)
        told["other"] -= len(outcome.refusals) - outcome.refused  # named in doubt
        self.refused += told


class Sending:
    """One input on its way.

    Args:
        state: how far it is; changed and written as it goes on.
        changed: set when the client's `waiting` changes.
    Attributes: rest: a last line that is not whole, and not sent.
    """

    rest = b""

    def __init__(
        self,
        source: Source,
        client: Client,
        state: State,
        file: StateFile,
        refused: RefusedFile,
        totals: Totals,
        parallel: int,
        changed: asyncio.Event,
    ) -> None:
        self._source = source
        self._client = client
        self._state = state
        self._file = file
        self._refused = refused
        self._totals = totals
        self._most = parallel + _MOST_HELD
        self._changed = changed
        self._tasks: dict[Piece, asyncio.Task[None]] = {}
        self._unsent: set[Piece] = set()  # of the blocks that were read: not answered yet
        self._moving: set[str] = set()  # lanes of which something was answered in this pass
        self._aside: dict[str, Mark] = {}
        self._failed: BaseException | None = None
        self._from, self._at = dict(state.behind), state.done

    async def run(self) -> None:
        """Returns once all is answered. What is answered is remembered, however this ends.

        Raises: DatapipeError, OSError: of the input, the state file or the service.
        """
        self._state.whole = False
        self.save()
        saving = asyncio.create_task(self._save_now_and_then())
        try:
            while not self._state.whole:
                await self._pass()
                self.save()  # how far it was, before it goes back
                self._state.whole = not self._aside
                self._from, self._at = self._aside, min(self._aside.values(), default=self._at)
                self._aside = {}
        finally:
            saving.cancel()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(saving, *self._tasks.values(), return_exceptions=True)
            self.save()

    async def _pass(self) -> None:
        """Read the input from the first place that is not done, and deliver what is left there."""
        reached, since = self._state.reached, self._from
        broken: BrokenInput | None = None
        self._moving.clear()
        try:
            async with contextlib.aclosing(self._blocks()) as read:
                async for block in read:
                    await self._deliver(block, reached, since)
        except BrokenInput as exc:
            broken = exc  # what came before may still arrive
        while self._tasks:
            await self._change()
        self._check()
        if broken is not None:
            raise broken

    async def _deliver(self, block: Block, reached: Mark, since: Mapping[str, Mark]) -> None:
        """Start what is left of a block. Args: reached, since: what the last pass left."""
        new = block.start >= reached
        left = [
            piece for piece in block.pieces
            if (new or block.start >= since.get(piece.lane, reached))
            and piece.lane not in self._aside
        ]  # fmt: skip
        if new:
            self._note(Outcome(0, len(block.refusals), block.refusals))
        self._at = block.end
        self._unsent.update(left)
        if block.ended and new:
            self._state.cuts.append(block.end.offset)
            self.save()
        for piece in left:
            await self._room()
            if piece.lane not in self._aside:
                self._start(piece)

    async def _blocks(self) -> AsyncGenerator[Block, None]:
        """Those of the input from `_at` on, read ahead by a thread.

        Raises: BrokenInput.
        """
        source, opened = self._source, array_start(self._source.head)
        start = max(self._at, Mark(opened))
        chunks = source.chunks(start.offset)
        items: Lines | Elements = Lines(chunks, source.name, grows=source.again)
        if opened:
            items = Elements(chunks, source.name, begun=start.offset > opened)
        steps: Iterator[Block] = blocks(items, start, self._state.cuts)

        def read() -> asyncio.Task[Block | None]:
            return asyncio.create_task(asyncio.to_thread(next, steps, None))

        ahead = read()
        try:
            while True:
                await asyncio.wait([ahead])  # which leaves it alone if this is cancelled
                if (block := ahead.result()) is None:
                    break
                ahead = read()
                yield block
        finally:
            if not ahead.done():
                source.stopped = True
                await asyncio.wait([ahead])
                ahead.exception()
        self.rest = items.rest

    # --- pieces under way ---

    def _start(self, piece: Piece) -> None:
        task = asyncio.create_task(self._client.deliver(piece, self._state.id, self._note))
        self._tasks[piece] = task

        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[piece]
            self._changed.set()
            if task.cancelled():
                return
            if (failed := task.exception()) is not None:
                self._failed = self._failed or failed
                return
            self._unsent.discard(piece)
            self._moving.add(piece.lane)

        task.add_done_callback(ended)

    async def _room(self) -> None:
        """Wait until another piece may be started. Raises: what ended one."""
        self._check()
        while len(self._tasks) >= self._most:
            waiting = self._client.waiting
            full = {piece.lane for piece in waiting}
            others = (self._moving | {piece.lane for piece in self._unsent}) - full
            if len(waiting) == len(self._tasks) and self._source.again and others:
                for lane in full:
                    self._set_aside(lane)
            await self._change()

    def _set_aside(self, lane: str) -> None:
        pieces = {piece for piece in self._unsent if piece.lane == lane}
        self._aside[lane] = min(piece.start for piece in pieces)
        self._unsent -= pieces
        for piece in pieces & self._tasks.keys():
            self._tasks[piece].cancel()

    async def _change(self) -> None:
        """Wait until a piece ends, or begins to wait for room. Raises: what ended one."""
        self._changed.clear()
        await self._changed.wait()
        self._check()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _note(self, outcome: Outcome) -> None:
        self._totals.add(outcome)
        self._refused.add(outcome.refusals)

    # --- what is remembered ---

    def save(self) -> None:
        """Write how far it is. Raises: DatapipeError, OSError."""
        state = self._state
        reached = max(state.reached, self._at)
        behind = {lane: max(mark, self._at) for lane, mark in self._from.items()} | self._aside
        for piece in self._unsent:
            behind[piece.lane] = min(behind.get(piece.lane, reached), piece.start)
        state.reached = reached
        state.behind = {lane: mark for lane, mark in behind.items() if mark < reached}
        done = min(state.behind.values(), default=reached)
        if done > state.done:
            state.advanced_at = datetime.now(UTC)
        state.done = done
        self._refused.flush()
        self._file.write(state)

    async def _save_now_and_then(self) -> None:
        try:
            while True:
                await asyncio.sleep(_SAVE_S)
                self.save()
        except (DatapipeError, OSError) as exc:
            self._failed = exc
            self._changed.set()
