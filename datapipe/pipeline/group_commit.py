"""Group commit: rows that arrive while an append is under way share the next one.

A lone request waits for one append, many at once share one. There is one `GroupCommit` for each
queue of the mirror, so that a queue in trouble holds up no other. A mirror that lingers, as each
append costs money there and a round trip, first gathers for a small part of that trip. Others need
no timer: what goes out while an append is under way must be worth an append of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Chunk, seal
from datapipe.health import Health
from datapipe.mirrors import Appended, Mirror, Traits, name_of
from datapipe.pipeline.tasks import Failed, start

# Many requests are spread over so many appends, of mirrors that linger and of others: one is under
# way while the next is gathered. Each stray request in an append of its own costs much: with three
# NATS servers on the same machine a million events of 64 connections took 134 CPU seconds in all
# instead of 91, of 256 connections 81 instead of 58.
_SPREAD_LINGERING, _SPREAD, _CROWD = 4, 2, 32
_WORTH_BYTES = 65_536  # of few requests, such as batches
_PATIENCE_S = 0.02  # an append that takes longer holds up no others, if there may be several
# Turns of the event loop after an append: those that waited for it are answered, their answers go
# out, the next requests come in, and are gathered. Without them one half of the connections waits
# while the other half is appended, in twice as many appends: with 16 connections 16,600 events a
# second instead of 20,800, with 64 33,700 instead of 35,500.
_TURNS = 4

log = structlog.stdlib.get_logger("datapipe.pipeline.group_commit")

# called once the rows are durable, or with why they are not; raises nothing
Done = Callable[[Exception | None], None]
Request = tuple[Sequence[Chunk], Done]


class GroupCommit:
    """What waits to be appended to one queue of the mirror, and the tasks that append it.

    Args:
        book: enters the outcome of an append, and when it began (`time.perf_counter`).
        health: shows the appends under way; `book` enters how they end.
        failed: gets the error of a task that dies; requests that wait get it as well.
        linger_s: gather for at least so long.
        timeout_s: until requests are refused because the mirror does not answer; the mirror gives
            up by itself, so this is for a disk that does not even return an error.
    """

    def __init__(
        self,
        mirror: Mirror,
        book: Callable[[Appended, float], None],
        health: Health,
        failed: Failed,
        linger_s: float,
        timeout_s: float,
    ) -> None:
        self._mirror = mirror
        self._book = book
        self._health = health
        self._failed = failed
        self._linger_s = linger_s
        self._timeout_s = timeout_s
        self._waiting: list[Request] = []
        self._bytes = 0
        self._under_way = 0  # requests whose append has begun
        self._hangs = False  # an append takes longer than `timeout_s`
        self._arrived = asyncio.Event()
        self._gathering = asyncio.Lock()
        self._running = 0  # counted by the tasks: one that has left its loop takes no more requests
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling = False

    def add(self, chunks: Sequence[Chunk], done: Done) -> None:
        """Take rows in; `done` hears once they are durable, or of MirrorUnavailable."""
        if self._hangs:  # no more may pile up behind it
            done(self._no_answer())
            return
        self._waiting.append((chunks, done))
        for chunk in chunks:
            self._bytes += len(chunk.data)
        self._arrived.set()
        if not self._gathering.locked() and self._running < self._mirror.traits.appends_at_once:
            self._running += 1
            task = start(self._run(), self._failed)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        """Gather, seal, append, book, release, until nothing waits or too many of these run."""
        try:
            while self._waiting and self._running <= self._mirror.traits.appends_at_once:
                async with self._gathering:
                    requests = await self._gather()
                if not requests:  # another task took them, or they were refused
                    continue
                error = await self._append(requests)
                self._release(requests, error)
                for _ in range(_TURNS):
                    await asyncio.sleep(0)
        except Exception as exc:  # the service ends with it
            self._release(self._take_waiting(), exc)
            raise
        finally:
            self._running -= 1

    async def _gather(self) -> list[Request]:
        """What waits, once it no longer pays to wait for more; nothing, if all was refused."""
        traits, loop = self._mirror.traits, asyncio.get_running_loop()
        linger_s = max(self._linger_s, traits.linger_s)
        until = loop.time() + (linger_s or _PATIENCE_S)
        while self._waiting and not self._enough(traits):
            if loop.time() >= until or not (linger_s or self._under_way):
                break
            self._arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._arrived.wait()
        return self._take_waiting()

    def _enough(self, traits: Traits) -> bool:
        """Whether a segment is full; or, unless it is to linger, a fair share of the requests."""
        if self._settling or self._bytes >= traits.batch_bytes:
            return True
        if self._linger_s:
            return False
        crowd = max(len(self._waiting) + self._under_way, _CROWD)
        if traits.linger_s:
            return len(self._waiting) * _SPREAD_LINGERING >= crowd
        return len(self._waiting) * _SPREAD >= crowd or self._bytes >= _WORTH_BYTES

    def _take_waiting(self) -> list[Request]:
        requests, self._waiting, self._bytes = self._waiting, [], 0
        return requests

    async def _append(self, requests: list[Request]) -> Exception | None:
        """Seal, append and book; why not all of it is durable."""
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        hanging = loop.call_later(self._timeout_s, self._give_up, requests)
        count = len(requests)
        self._under_way += count
        try:
            chunks = [chunk for of_one, _ in requests for chunk in of_one]
            segments = seal(chunks, self._mirror.traits.batch_bytes)
            with self._health.doing("an append"):
                appended = await self._mirror.append(segments)
            self._book(appended, began)
        except Exception as exc:  # an internal error: each request answers 500, and logs it
            self._health.fails(began, repr(exc))
            return exc
        finally:
            hanging.cancel()
            self._hangs = False
            self._under_way -= count
            self._arrived.set()  # who gathers meanwhile has done so for long enough
        return appended.error

    def _give_up(self, requests: list[Request]) -> None:
        """An append hangs: refuse all until it ends. What it stores is booked then, and loaded."""
        self._hangs = True
        refused = self._no_answer()
        self._book(Appended((), refused), time.perf_counter())
        self._release(requests, refused)
        self._release(self._take_waiting(), refused)

    def _no_answer(self) -> MirrorUnavailable:
        name = name_of(self._mirror.state().kind)
        return MirrorUnavailable(f"{name} does not answer (mirror_timeout)")

    def _release(self, requests: list[Request], error: Exception | None) -> None:
        """Answer each request once: those that were given up on are no longer in the list."""
        released = requests.copy()
        requests.clear()
        for _, done in released:
            try:
                done(error)
            except Exception:  # the others must hear of it all the same
                log.exception("fault")

    def settle(self) -> set[asyncio.Task[None]]:
        """From now on append without lingering. Returns the tasks that append what still waits."""
        self._settling = True
        self._arrived.set()
        return self._tasks
