"""Once a second: the readings, and the status for those who follow it, however many they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from datapipe.monitor.status import Status
from datapipe.pipeline.tasks import background

EVERY_S = 1.0


class News(NamedTuple):
    """How things are, as `/status.json` shows it.

    Attributes: history: its key of that name; fresh: it has points that the reader does not know.
    """

    status: Mapping[str, Any]
    history: Mapping[str, Any]
    fresh: bool


class Feed:
    """Ticks `Status`, and gives one snapshot a second to all who listen."""

    def __init__(self, status: Status) -> None:
        self.ended = False
        self._status = status
        self._listeners = 0
        self._newcomer = False  # since the last second
        self._news = asyncio.Event()  # a new one for each second
        self._latest: News | None = None  # kept while somebody listens

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
                status = await self._status.current()
                old = self._latest.history if self._latest else {}
                history = await self._status.series() if whole else old
                self._publish(News(status, history, whole))
            else:
                self._latest = None

    async def listen(self) -> AsyncGenerator[News]:
        """The same for all, each second until the service stops; at once, if there is one already.

        A listener that is slow misses some seconds; nothing gathers for it.
        """
        self._listeners += 1
        try:
            if self._latest is not None:  # at most a second old, or there were no listeners
                yield self._latest._replace(fresh=True)
            else:
                self._newcomer = True
            while not self.ended:
                await self._news.wait()
                if self._latest is not None:
                    yield self._latest
        finally:
            self._listeners -= 1

    def end(self) -> None:
        """All listeners end, at once."""
        self.ended = True
        self._publish(None)

    def _publish(self, latest: News | None) -> None:
        self._latest = latest
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
