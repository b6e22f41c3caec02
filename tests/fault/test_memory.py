"""What a burst took is given back once it is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.fault.outage import rss_mb
from tests.service import Service, until
from tests.wire import crash

MakeService = Callable[..., Service]
EVENTS = 1_000
POSTS = 400


async def test_a_burst_leaves_little_behind(database: str, make_service: MakeService) -> None:
    service = await make_service(
        database_url=database, load_interval=3600, load_min_interval=3600
    ).start()
    batch = [crash("x" * 100, number) for number in range(EVENTS)]
    assert (await service.post(batch))[0] == 200
    assert (await service.load())["loaded"] == {"crash_report": EVENTS}
    before = rss_mb(service.pid)
    for _ in range(POSTS // 8):
        answers = await asyncio.gather(*(service.post(batch) for _ in range(8)))
        assert {status for status, _ in answers} == {200}
    assert rss_mb(service.pid, "VmHWM") > before + 30  # so there is something to give back
    await service.load()
    assert (await service.post(batch[:2]))[0] == 200  # some wait: that is no hindrance

    async def given_back() -> bool:
        return rss_mb(service.pid) < before + 8

    await until(given_back, 15, f"memory below {before + 8:.0f} MB")
