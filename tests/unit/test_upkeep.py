"""What a stop gives back to IronMQ, however many messages are listed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from datapipe.events.segment import Segment
from datapipe.mirrors.ironmq.books import Books, Held
from datapipe.mirrors.ironmq.upkeep import Upkeep

LISTED = 130_000  # as many as the default settings allow


class _Client:
    """Answers after two turns of the loop, as one over a socket does."""

    def __init__(self) -> None:
        self.released: set[str] = set()

    async def release(self, queue: str, id: str, reservation: str) -> None:
        await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        self.released.add(id)


async def test_a_stop_releases_what_is_reserved_among_all_that_is_listed() -> None:
    books, client = Books("one", "", time.time), _Client()
    segment = Segment("install", (), b"", 1)
    listed = {number: Held.of(str(number), segment, 100, 0.0) for number in range(LISTED)}
    books.held["install"] = listed
    reserved = list(listed.values())[::5000]
    for held in reserved:
        held.lease("lease", 120, time.time())
    untyped: Any = client
    await Upkeep(untyped, books).release_all()
    assert client.released == {held.id for held in reserved}
