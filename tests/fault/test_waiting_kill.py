"""What `Prefer: wait` says is loaded is in the database at that moment, whatever happens next."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable

import aiohttp

from tests.postgres import Postgres
from tests.service import Service, until

PREFER = {"Prefer": "wait=20"}


async def test_what_is_said_to_be_loaded_outlives_a_kill(
    database: str, make_service: Callable[..., Service]
) -> None:
    """What was loaded is there before any restart; all that was accepted is there after one."""
    service = await make_service(database_url=database, load_interval=300).start()
    numbers, loaded, accepted = itertools.count(), set[int](), set[int]()

    async def client(number: int) -> None:
        headers = PREFER if number % 4 else {}
        while True:
            user = next(numbers)
            event = {"event_name": "install", "user_id": user, "timestamp": 1}
            status, said = await service.post([event], headers=headers)
            if status in (200, 202):
                accepted.add(user)
            if said.get("loaded"):
                loaded.add(user)
                if len(loaded) == 200:  # at once: what is said too early is not there
                    os.kill(service.pid, signal.SIGKILL)

    ends = await asyncio.gather(*map(client, range(32)), return_exceptions=True)
    assert all(isinstance(end, aiohttp.ClientError) for end in ends), ends
    await service.kill()

    def rows() -> Counter[int]:
        return Counter(
            user for (user,) in Postgres.execute(database, "SELECT user_id FROM install")
        )

    assert loaded <= rows().keys()
    await service.start()
    await until(lambda: _all_there(accepted, rows), what="all that was accepted")
    assert set(rows().values()) == {1}


async def _all_there(accepted: set[int], rows: Callable[[], Counter[int]]) -> bool:
    return accepted <= rows().keys()
