"""What open status pages cost: `python -m benchmarks.pages`.

The service's own processor time with none and with 100 pages open while it idles, then how many
events a second it accepts with and without them, in turns, so that both meet the same weather.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from tests.postgres import Postgres
from tests.service import Service

EVENT = {"event_name": "crash_report", "user_id": 888, "timestamp": 1000, "message": "have_fun"}
BATCH = json.dumps([EVENT] * 100).encode()
CLIENTS = 8


def cpu_seconds(pid: int) -> float:
    """Processor time that the process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def pages(url: str, number: int) -> AsyncIterator[list[int]]:
    """Keep pages open, as their scripts do; how many bytes each has read so far."""
    read = [0] * number

    async def look(session: aiohttp.ClientSession, i: int) -> None:
        async with session.get(f"{url}/stream?sections") as response:
            async for chunk in response.content.iter_any():
                read[i] += len(chunk)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout()
    ) as session:
        tasks = [asyncio.create_task(look(session, i)) for i in range(number)]
        while not all(read):
            await asyncio.sleep(0.05)
        try:
            yield read
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def core_share(pid: int, seconds: float) -> float:
    before, began = cpu_seconds(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began)


async def accepted_per_cpu_second(service: Service, seconds: float) -> tuple[float, float]:
    """Events accepted per second, and per second of the service's processor time."""
    until = time.monotonic() + seconds
    sent = 0

    async def send() -> None:
        nonlocal sent
        while time.monotonic() < until:
            async with service.session.post(f"{service.url}/", data=BATCH) as response:
                assert response.status == 200, await response.text()
            sent += 100

    cpu, began = cpu_seconds(service.pid), time.monotonic()
    await asyncio.gather(*(send() for _ in range(CLIENTS)))
    return sent / (time.monotonic() - began), sent / (cpu_seconds(service.pid) - cpu)


async def measure(number: int, seconds: float, rounds: int) -> None:
    async with AsyncExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        postgres.start()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        service = Service(folder, database_url=postgres.create_database())
        await service.start()
        stack.push_async_callback(service.stop)

        idle = await core_share(service.pid, 3 * seconds)
        async with pages(service.url, number) as read:
            before = sum(read)
            busy = await core_share(service.pid, 3 * seconds)
            each = (sum(read) - before) / number / (3 * seconds)
        print(f"idle: {idle:.1%} of a core; {number} pages open: {busy:.1%}, so the pages cost "
              f"{busy - idle:.1%}; each reads {each:,.0f} bytes/s")  # fmt: skip

        rates: dict[int, list[tuple[float, float]]] = {0: [], number: []}
        await accepted_per_cpu_second(service, 2)
        for turn in range(rounds):
            for open_now in (0, number) if turn % 2 else (number, 0):
                async with pages(service.url, open_now):
                    rates[open_now].append(await accepted_per_cpu_second(service, seconds))
        for name, column in (("second", 0), ("second of its processor time", 1)):
            without, with_pages = (
                statistics.median(pair[column] for pair in rates[n]) for n in (0, number)
            )
            print(f"accepted per {name}: {without:,.0f} without pages, {with_pages:,.0f} with "
                  f"{number}: {with_pages / without:.3f} of it")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    asyncio.run(measure(args.pages, args.seconds, args.rounds))


if __name__ == "__main__":
    main()
