"""The pictures of the docs, of a real service under made-up traffic: `make screenshots`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from playwright.async_api import Browser

from tests.browser.chromium import Tab, chromium
from tests.postgres import Postgres
from tests.service import ROOT, Service

DOCS = ROOT / "docs"
WIDE = {"width": 1280, "height": 960}
PHONE = {"width": 360, "height": 780}
EVENTS = [
    {"event_name": "crash_report", "user_id": 888, "timestamp": 1000, "message": "have_fun"},
    {"event_name": "purchase", "user_id": 888, "timestamp": 1000, "sku": "gold-100"},
    {"event_name": "install", "user_id": 888, "timestamp": 1000},
]
WRONG = [{"event_name": "instal", "user_id": 888}, {"event_name": "purchase", "user_id": "888"}]
REFUSED = {"event_name": "purchase", "user_id": 888, "timestamp": 1000, "sku": ""}
THINGS = ("account", "advert", "basket", "campaign", "checkout", "coupon", "gift_card", "invoice",
          "payment", "photo", "push_message", "refund", "return", "review", "search", "session",
          "shipment", "subscription", "voucher", "wish_list")  # fmt: skip
DONE = ("opened", "closed", "changed", "viewed_in_the_app")


def types(count: int) -> dict[str, dict[str, str]]:
    """So many event types more, as the setting `events` has them."""
    names = [f"{thing}_{done}" for done in DONE for thing in THINGS]
    names += [f"{name}_in_shop_{shop}" for shop in range(1, 20) for name in names]
    return {name: {"user_id": "int"} for name in names[:count]}


class Traffic:
    """Posts events as a crowd of apps would: in waves, a few of them wrong."""

    def __init__(self, url: str, more: Iterable[str] = ()) -> None:
        self.url = url
        self.per_second = 400
        self.events = [*EVENTS, *({"event_name": name, "user_id": 888} for name in more)]

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
                shares = [5, 3, 1, 2][: len(self.events)] + [1] * (len(self.events) - 4)
                count = round(self.per_second / 4 * wave)
                batch: list[object] = [*chance.choices(self.events, shares, k=count)]
                if chance.random() < 0.03:
                    batch.append(chance.choice(WRONG))
                async with session.post(f"{self.url}/", data=json.dumps(batch)) as response:
                    await response.read()
                await asyncio.sleep(0.25)


async def picture(browser: Browser, url: str, name: str, **context: Any) -> None:
    """Of a page of the service, at most as high as its viewport."""
    tab = await Tab.open(browser, url, **{"viewport": WIDE, **context})
    await take_it(tab, name)


async def take_it(tab: Tab, name: str) -> None:
    await tab.page.screenshot(path=DOCS / f"{name}.png")
    await tab.page.context.close()
    print(f"docs/{name}.png", flush=True)


async def take(seconds: float) -> None:
    async with AsyncExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        postgres.start()
        browser = await stack.enter_async_context(chromium())

        async def service(count: int = 0, busy: int = 0) -> tuple[str, Traffic, str]:
            """One that knows so many types more, and traffic of some of them."""
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
            database, events = postgres.create_database(), types(count)
            service = await Service(
                folder, database_url=database, load_interval=5, shutdown_timeout=1, events=events
            ).start()
            stack.push_async_callback(service.stop)
            traffic = Traffic(service.url, [*events][:busy])
            await stack.enter_async_context(traffic.running())
            return service.url, traffic, database

        few, traffic, database = await service()
        forty, _, _ = await service(37, busy=4)
        thousand, _, _ = await service(997, busy=90)
        await asyncio.sleep(seconds)
        await picture(browser, few, "healthy")
        await picture(browser, few, "healthy-dark", color_scheme="dark")
        await picture(browser, few, "phone", viewport=PHONE)
        tab = await Tab.open(browser, forty, viewport=WIDE)
        await tab.page.click("#types a >> text=purchase")
        await tab.page.locator("#types .more").wait_for()
        await take_it(tab, "forty-types")
        tab = await Tab.open(browser, thousand, viewport=WIDE)
        await tab.page.get_by_role("searchbox").fill("checkout")
        await tab.shows("#types-said", "match")
        await take_it(tab, "search")
        Postgres.execute(database, "ALTER TABLE purchase ADD CHECK (sku <> '') NOT VALID")
        traffic.events += [REFUSED]
        await asyncio.sleep(12)
        traffic.events.remove(REFUSED)
        await asyncio.sleep(8)  # until they are counted
        tab = await Tab.open(browser, few, viewport=WIDE)
        await tab.page.click("details.matter > summary")
        await take_it(tab, "dead-letters")
        async with aiohttp.ClientSession() as session:
            await session.post(f"{few}/dead/drop", json={"all": True})
        await asyncio.sleep(10)
        postgres.stop()
        await asyncio.sleep(seconds / 3)
        await picture(browser, few, "database-down")
        await picture(browser, few, "database-down-dark", color_scheme="dark")
        postgres.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = "of traffic before the first picture; the charts show 15 minutes"
    parser.add_argument("--seconds", type=float, default=420.0, help=text)
    asyncio.run(take(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
