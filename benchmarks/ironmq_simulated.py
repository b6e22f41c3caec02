"""What IronMQ costs over hours and days, on a simulated clock: requests, by kind.

The service is the real one; its database is in memory, and IronMQ is the stand-in.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from datapipe.app import PIPELINE, create_app, create_runner
from datapipe.mirrors.ironmq.mirror import open_ironmq
from datapipe.settings import Settings
from tests.doubles.ironmq import IronMQ
from tests.doubles.memory_database import MemoryDatabase
from tests.doubles.virtual_time import VirtualTime

HOUR_GOAL = 1500
DAY_GOAL = 100  # per lane
LANES = 3


def hour() -> Counter[str]:
    """One event a second for an hour, with `mirror_linger_ms` at 5,000; all of it loaded."""
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(_hour())


def day() -> Counter[str]:
    """A process that does nothing for a day; each lane has its queue."""
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(_day())


async def _hour() -> Counter[str]:
    database = MemoryDatabase()
    async with IronMQ(clock=_now, latency=0.05) as mq:
        async with (
            _service(mq, database, mirror_linger_ms=5000) as url,
            aiohttp.ClientSession() as client,
            asyncio.TaskGroup() as posting,
        ):
            for number in range(3600):
                posting.create_task(_post(client, url, number))
                await asyncio.sleep(1)
        rows = sum(map(len, database.lines.values()))
        left = sum(queue.size for queue in mq.queues.values())
        if (rows, left) != (3600, 0):
            raise RuntimeError(f"3600 events were sent, {rows} loaded; {left} messages are left")
        return mq.requests


async def _day() -> Counter[str]:
    async with IronMQ(clock=_now, latency=0.05) as mq:
        for lane in ("crash_report", "install", "purchase"):
            mq.put(lane, [])
        async with _service(mq, MemoryDatabase()):
            await asyncio.sleep(86_400)
        return mq.requests


async def _post(client: aiohttp.ClientSession, url: str, number: int) -> None:
    event = {"event_name": "install", "user_id": number, "timestamp": 1000}
    async with client.post(url, json=event) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())


@asynccontextmanager
async def _service(mq: IronMQ, database: MemoryDatabase, **more: int) -> AsyncIterator[str]:
    """A service at its default settings, and its address."""
    settings = Settings(
        host="127.0.0.1", port=0, ironmq_host=mq.host, ironmq_token=mq.token,
        ironmq_project_id=mq.project_id, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    app = create_app(
        settings,
        open_mirror=lambda settings, process: open_ironmq(settings, process, _now),
        open_sink=database.open,
    )
    runner = create_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/"
        await app[PIPELINE].stop()
    finally:
        await runner.cleanup()


def _now() -> float:
    return 1_800_000_000.0 + asyncio.get_running_loop().time()
