"""Dead letters are counted at the start, and soon after a change."""

from __future__ import annotations

import asyncio
from typing import Any

from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.sinks import Selection


class Shelf:
    """As many as it is told."""

    def __init__(self) -> None:
        self.counts = {"install": 2}
        self.asked = asyncio.Semaphore(0)

    async def count_dead(self) -> dict[str, int]:
        self.asked.release()
        return dict(self.counts)

    async def drop(self, selection: Selection) -> int:
        return self.counts.pop("install", 0)


def letters_of(shelf: Any) -> DeadLetters:
    registry: Any = None
    return DeadLetters(shelf, registry)


def fail(exc: BaseException) -> None:
    raise exc


async def test_a_change_is_counted_at_once() -> None:
    shelf = Shelf()
    letters = letters_of(shelf)
    assert (letters.present, letters.counted_at) == ({}, None)
    async with asyncio.timeout(5), letters.counting(fail):
        await shelf.asked.acquire()
        await asyncio.sleep(0)
        assert letters.present == {"install": 2}
        assert letters.counted_at is not None
        assert await letters.drop(Selection()) == {"dropped": 2}
        await shelf.asked.acquire()  # the next would be due in 10 s
        await asyncio.sleep(0)
        assert letters.present == {}
