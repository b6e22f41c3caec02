"""The page with many event types: an overview of bounded size, and how the rest is found."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from playwright.async_api import expect

from datapipe import testing
from tests.browser.chromium import OpenPage, Tab
from tests.browser.test_looks import violations

LONGEST = "a_name_of_an_event_type_that_is_as_long_as_it_ca"
WHY = "the table has no column user_id"
MOST_BYTES = 200_000
# how many lines each part of a name takes, of which only its underscores may be the ends
LINES = """[...document.querySelectorAll("#types th a")].flatMap((name) =>
  [...name.childNodes].filter((part) => part.nodeType === Node.TEXT_NODE).map((part) => {
    const range = document.createRange();
    range.selectNode(part);
    return new Set([...range.getClientRects()].map((box) => box.top)).size;
  }))"""


def event(name: str) -> dict[str, Any]:
    return {"event_name": name, "user_id": 1}


@asynccontextmanager
async def service_of(names: list[str]) -> AsyncIterator[testing.Service]:
    """Knows these types alone; something waits in the first three, as all that is posted does."""
    events: Mapping[str, Any] = {name: {"user_id": "int"} for name in names}
    async with testing.service(events=events, builtin_events=False, load_interval=300) as service:
        await service.post([event(name) for name in names[:3]])
        service.pipeline.status.tick()
        yield service


async def first_news(service: testing.Service) -> str:
    """The table of types in what the page's script hears first."""
    async with (
        aiohttp.ClientSession(read_bufsize=2 * MOST_BYTES) as session,
        session.get(f"{service.url}stream?sections") as stream,
    ):
        async for line in stream.content:
            if line.startswith(b"data:"):
                assert len(line) < MOST_BYTES
                return str(json.loads(line[5:])["types"])
    raise EOFError


async def size(tab: Tab) -> tuple[int, int]:
    """Height of the page, and how wide it is with all that sticks out."""
    root = "document.documentElement"
    height, width = await tab.page.evaluate(f"[{root}.scrollHeight, {root}.scrollWidth]")
    return height, width


async def names_shown(tab: Tab) -> list[str]:
    return await tab.page.locator("#types th a").all_text_contents()


@pytest.mark.parametrize(
    ("width", "most", "scheme"), [(1280, 1900, "light"), (360, 4000, "dark")]
)  # fmt: skip
async def test_forty_types_fit(open_page: OpenPage, width: int, most: int, scheme: str) -> None:
    names = [LONGEST, *(f"type_{number}" for number in range(39))]
    async with service_of(names) as service:
        for name in names[:3]:
            for _ in range(4):  # the last twelve loads are there, too
                await service.post(event(name))
                await service.rows(name)
        viewport = {"width": width, "height": 800}
        tab = await open_page(service.url.rstrip("/"), viewport=viewport, color_scheme=scheme)
        height, across = await size(tab)
        assert height <= most
        assert across == width, "something sticks out"
        assert await names_shown(tab) == names[:3]
        assert set(await tab.page.evaluate(LINES)) == {1}, "a name is broken within a word"
        await tab.page.click("#idle summary")
        assert await tab.page.locator("#idle li:visible").count() == 37
        await tab.page.click("#idle a >> text=type_30")
        await tab.shows("#type-type_30 .more", "recovered")
        assert await tab.page.evaluate("document.activeElement.textContent") == "type_30"
        assert await violations(tab) == []
        assert (await size(tab))[1] == width, "something sticks out"
        await tab.page.context.close()


async def test_a_thousand_types_without_scripts(open_page: OpenPage) -> None:
    names = [f"type_{number:03}_{'x' * 39}" for number in range(1000)]
    async with service_of(names) as service:
        await service.post([event(name) for name in names])
        lanes = service.pipeline.buffer.lanes
        for name in names[900:]:
            lanes[name].blocked = WHY
        service.pipeline.status.tick()
        tab = await open_page(service.url.rstrip("/"), java_script_enabled=False)
        assert len((await tab.page.content()).encode()) < MOST_BYTES
        assert await names_shown(tab) == names[900:950]
        assert await tab.text("#types .why") == WHY
        assert await tab.page.locator("#types .why").count() == 50
        assert await tab.text("#types-said") == (
            "50 of 1,000 are shown; search for the rest. "
            "100 are blocked, 50 of them are shown here: search for “blocked”."
        )
        assert (await first_news(service)).count("<tbody") == 50
        search = tab.page.get_by_role("searchbox")
        await search.fill("type 97")
        await search.press("Enter")
        assert await names_shown(tab) == names[970:980]
        assert await tab.text("#types-said") == "10 of 1,000 match “type 97”."
        await service.post([event(names[1])] * 5)
        await tab.page.get_by_role("searchbox").fill("")
        await tab.page.get_by_label("Order").select_option("most waiting")
        await tab.page.get_by_role("button", name="Show").click()
        assert (await names_shown(tab))[:3] == [names[1], names[0], names[2]]
        await tab.page.click(f"#types a >> text={names[2]}")
        assert "accepted\n2" in await tab.text(f"#type-{names[2]} .equation")
        assert await tab.page.locator(f"#type-{names[2]} .plot svg").count() == 2
        assert (await names_shown(tab))[0] == names[1], "the order stays"


async def test_search_as_one_types_and_rows_that_stay_open(open_page: OpenPage) -> None:
    names = [f"type_{number:03}_{'x' * 39}" for number in range(1000)]
    async with service_of(names) as service:
        tab = await open_page(service.url.rstrip("/"))
        search = tab.page.get_by_role("searchbox")
        await search.press_sequentially("type_50")
        await expect(tab.page.locator("#types-said")).to_have_text("10 of 1,000 match “type_50”.")
        await tab.shows("#announcer", "10 of 1,000 match")
        assert tab.page.url.endswith("?q=type_50")
        assert await tab.page.evaluate("document.activeElement.value") == "type_50"
        assert await names_shown(tab) == names[500:510]

        opened = tab.page.locator(f"#type-{names[507]}")
        await opened.locator("a").press("Enter")
        await opened.locator(".more").wait_for()
        await service.post([event(name) for name in names[:60] + names[505:508]])
        await expect(opened.locator('.equation [data-v="accepted"]')).to_have_text("1")
        assert tab.page.url.endswith(f"?q=type_50&type={names[507]}#type-{names[507]}")
        # what had nothing is busy now and goes up; who reads does not lose the place
        assert (await names_shown(tab))[:3] == names[505:508]
        assert await tab.page.evaluate("document.activeElement.textContent") == names[507]
        assert await opened.locator("a").get_attribute("aria-expanded") == "true"
        plot = opened.locator("[data-chart=depth] .plot")
        await plot.press("End")
        assert "UTC" in (await plot.get_attribute("aria-valuetext") or "")

        await tab.page.go_back()
        await expect(opened.locator(".more")).to_have_count(0)
        await search.fill("")
        await expect(tab.page.locator("#types tbody")).to_have_count(50)
        await tab.page.get_by_label("Order").select_option("by name")
        await tab.page.wait_for_url("**/?sort=name")
        await tab.page.context.close()
