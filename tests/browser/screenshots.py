"""The pictures of the docs, of a real service under made-up traffic: `make screenshots`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from playwright.async_api import Browser

from tests.browser.chromium import Tab, chromium
from tests.postgres import Postgres
from tests.service import ROOT, Service

DOCS = ROOT / "docs"
WIDE = {"width": 1280, "height": 1180}
PHONE = {"width": 360, "height": 780}
EVENTS = [
    {"event_name": "crash_report", "user_id": 888, "timestamp": 1000, "message": "have_fun"},
    {"event_name": "purchase", "user_id": 888, "timestamp": 1000, "sku": "gold-100"},
    {"event_name": "install", "user_id": 888, "timestamp": 1000},
]
WRONG = [{"event_name": "instal", "user_id": 888}, {"event_name": "purchase", "user_id": "888"}]


class Traffic:
    """Posts events as a crowd of apps would: in waves, a few of them wrong."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.per_second = 400

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._send())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _send(self) -> None:
        chance = random.Random(7)
        async with aiohttp.ClientSession() as session:
            second = 0.0
            while True:
                second += 0.25
                wave = 1 + 0.5 * math.sin(second / 17) + chance.uniform(-0.15, 0.15)
                batch = chance.choices(EVENTS, (5, 3, 1), k=round(self.per_second / 4 * wave))
                if chance.random() < 0.03:
                    batch.append(chance.choice(WRONG))
                async with session.post(f"{self.url}/", data=json.dumps(batch)) as response:
                    await response.read()
                await asyncio.sleep(0.25)


async def picture(browser: Browser, url: str, name: str, **context: object) -> None:
    tab = await Tab.open(browser, url, **{"viewport": WIDE, **context})
    await tab.page.screenshot(path=DOCS / f"{name}.png")
    await tab.page.context.close()
    print(f"docs/{name}.png", flush=True)


async def take(seconds: float) -> None:
    async with AsyncExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        postgres.start()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        service = Service(
            folder, database_url=postgres.create_database(), load_interval=5, shutdown_timeout=1
        )
        await service.start()
        stack.push_async_callback(service.stop)
        browser = await stack.enter_async_context(chromium())
        traffic = Traffic(service.url)
        async with traffic.running():
            await asyncio.sleep(seconds)
            await picture(browser, service.url, "healthy")
            await picture(browser, service.url, "healthy-dark", color_scheme="dark")
            await picture(browser, service.url, "phone", viewport=PHONE)
            traffic.per_second = 2500
            await asyncio.sleep(seconds / 3)
            await picture(browser, service.url, "busy")
            traffic.per_second = 800
            await asyncio.sleep(15)
            postgres.stop()
            await asyncio.sleep(seconds / 3)
            await picture(browser, service.url, "database-down")
            await picture(browser, service.url, "database-down-dark", color_scheme="dark")
            postgres.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = "of traffic before the first picture; the charts show 15 minutes"
    parser.add_argument("--seconds", type=float, default=300.0, help=text)
    asyncio.run(take(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
