"""Once a second: the readings, and the status for those who follow it, however many they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from datapipe.monitor.status import Status
from datapipe.pipeline.tasks import background

EVERY_S = 1.0


class Feed:
    """Ticks `Status`, and gives one snapshot a second to all who listen."""

    def __init__(self, status: Status) -> None:
        self.ended = False
        self._status = status
        self._listeners = 0
        self._newcomer = False  # since the last second
        self._news = asyncio.Event()  # a new one for each second
        self._latest: Mapping[str, Any] = {}

    async def run(self) -> None:
        """For ever: once a second."""
        due = time.monotonic()
        while True:
            due = max(due + EVERY_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            closed = self._status.history.closed
            self._status.tick()
            if self._listeners:
                whole = self._newcomer or self._status.history.closed != closed
                await self._status.refresh(history=whole)
                whole |= self._newcomer  # who came meanwhile is content with the last known charts
                self._newcomer = False
                status = self._status
                self._publish(await status.whole() if whole else status.snapshot())

    async def listen(self) -> AsyncGenerator[Mapping[str, Any]]:
        """What `/status.json` shows, the same object for all, each second until the service stops.

        The series of the charts are in the first one and then whenever they got a new point.
        A listener that is slow misses some seconds; nothing gathers for it.
        """
        self._listeners += 1
        self._newcomer = True
        try:
            while not self.ended:
                await self._news.wait()
                if not self.ended:
                    yield self._latest
        finally:
            self._listeners -= 1

    def end(self) -> None:
        """All listeners end, at once."""
        self.ended = True
        self._publish({})

    def _publish(self, status: Mapping[str, Any]) -> None:
        self._latest = status
        news, self._news = self._news, asyncio.Event()
        news.set()


@asynccontextmanager
async def running(status: Status, failed: Callable[[BaseException], None]) -> AsyncIterator[Feed]:
    """A feed that ticks in the background; should that end with an error, `failed` gets it."""
    feed = Feed(status)
    async with background([feed.run()], failed):
        try:
            yield feed
        finally:
            feed.end()
