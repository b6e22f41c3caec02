"""The page's news, once a second: one snapshot and one encoding, however many pages are open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from datapipe.monitor.status import Status
from datapipe.pipeline.tasks import background

EVERY_S = 1.0


class Feed:
    """Ticks `Status`, and gives what it tells to all who listen."""

    def __init__(self, status: Status) -> None:
        self.ended = False
        self._status = status
        self._listeners = 0
        self._news = asyncio.Event()  # a new one for each second
        self._text = ""

    async def run(self) -> None:
        """For ever: once a second."""
        due = time.monotonic()
        while True:
            due = max(due + EVERY_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            closed = self._status.history.closed
            self._status.tick()
            if self._listeners:
                await self._status.refresh()
                fresh_points = self._status.history.closed != closed
                self._publish(await self._encode(with_history=fresh_points))

    async def listen(self) -> AsyncGenerator[str]:
        """What `/status.json` tells, at once, and each second until the service stops.

        The series of the pictures are in the first one and then whenever they got a new point.
        A listener that is slow misses some seconds; nothing gathers for it.
        """
        self._listeners += 1
        try:
            if not self.ended:
                yield await self._encode(with_history=True)
            while not self.ended:
                await self._news.wait()
                if not self.ended:
                    yield self._text
        finally:
            self._listeners -= 1

    def end(self) -> None:
        """All listeners end, at once."""
        self.ended = True
        self._publish("")

    async def _encode(self, *, with_history: bool) -> str:
        status = await self._status.whole() if with_history else self._status.snapshot()
        return msgspec.json.encode(status).decode()

    def _publish(self, text: str) -> None:
        self._text = text
        news, self._news = self._news, asyncio.Event()
        news.set()


@asynccontextmanager
async def running(status: Status, failed: Callable[[BaseException], None]) -> AsyncIterator[Feed]:
    """A feed that ticks in the background; should that end with an error, `failed` is told."""
    feed = Feed(status)
    async with background([feed.run()], failed):
        try:
            yield feed
        finally:
            feed.end()
