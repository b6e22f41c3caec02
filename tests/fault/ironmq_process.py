"""The stand-in for IronMQ as a process of its own: the mirror outlives the services."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.service import ROOT, until


class Queue:
    """`settings` point a service at it."""

    def __init__(self, told: dict[str, str], session: aiohttp.ClientSession) -> None:
        self.url = told["url"]
        self.settings = {
            "mirror": "ironmq", "ironmq_host": told["url"], "ironmq_token": told["token"],
            "ironmq_project_id": told["project_id"],
        }  # fmt: skip
        self._session = session

    async def order(self, **orders: Any) -> dict[str, Any]:
        """Faults and the like; see the stand-in. Its counters."""
        async with self._session.post(f"{self.url}/_control", json=orders) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def report(self) -> dict[str, Any]:
        async with self._session.get(f"{self.url}/_control") as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def reserve(self, queue: str, count: int, lease_s: float) -> int:
        """Reserve messages, as a process that dies with them; how many it got."""
        url = f"{self.url}/3/projects/{self.settings['ironmq_project_id']}/queues/{queue}"
        headers = {"Authorization": f"OAuth {self.settings['ironmq_token']}"}
        wanted = {"n": count, "timeout": round(lease_s)}
        async with self._session.post(
            f"{url}/reservations", json=wanted, headers=headers
        ) as response:
            return len((await response.json())["messages"])

    async def emptied(self, timeout_s: float = 40.0) -> None:
        """Wait until no message is left: all was loaded, and deleted."""

        async def empty() -> bool:
            return not sum((await self.report())["queues"].values())

        await until(empty, timeout_s, "an empty IronMQ")


@asynccontextmanager
async def running_queue(*options: str) -> AsyncIterator[Queue]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.doubles.ironmq", *options,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            told = json.loads(await process.stdout.readline())
        async with aiohttp.ClientSession() as session:
            yield Queue(told, session)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
