"""What helps people to use the page: axe-core's rules, calm, phones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import OpenPage, Tab
from tests.postgres import Postgres
from tests.service import Service

AXE = Path(__file__).parents[2] / ".cache/axe/node_modules/axe-core/axe.min.js"
CRASH = {"event_name": "crash_report", "user_id": 1, "timestamp": 2, "message": "boom"}


async def violations(tab: Tab) -> list[str]:
    await tab.page.evaluate(AXE.read_text())
    found: dict[str, Any] = await tab.page.evaluate("axe.run()")
    return [
        f"{each['id']}: {node['html']} {node['any']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(
    make_service: Callable[..., Service], open_page: OpenPage, scheme: str
) -> None:
    """Wide and narrow, with things refused and with the database away."""
    nowhere = "postgresql://postgres@127.0.0.1:1/none"
    keys = [{"name": "ios", "key": "k"}]
    service = await make_service(database_url=nowhere, load_interval=0.1, ingest_keys=keys).start()
    for body in ([CRASH] * 3, {"event_name": "nonesuch"}, "{"):
        await service.post(body, params={"key": "k"})
    for width in (1280, 360):
        size = {"width": width, "height": 800}
        tab = await open_page(service.url, color_scheme=scheme, viewport=size)
        await tab.shows("#sentence", "PostgreSQL does not answer")
        await tab.shows("#refusals", "nonesuch")
        assert await violations(tab) == []
        across = await tab.page.evaluate("document.documentElement.scrollWidth")
        assert across == width, "something sticks out"


async def test_numbers_change_and_nothing_else_moves(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    """No shift of the layout, and not a word for a screen reader, while all is well."""
    service = await make_service(database_url=database, load_interval=0.3).start()
    tab = await open_page(service.url)
    await tab.page.evaluate(
        """() => {
          window.shifts = [];
          window.words = 0;
          new PerformanceObserver((list) => {
            // the digits of a right-aligned number move themselves; nothing else may
            for (const { node } of list.getEntries().flatMap((entry) => entry.sources))
              if (node?.nodeType === 1 && !node.matches("[data-v]")) shifts.push(node.outerHTML);
          }).observe({ type: "layout-shift" });
          new MutationObserver(() => { words += 1; })
            .observe(document.getElementById("announcer"), { childList: true, subtree: true });
        }"""
    )
    for events in (3, 300, 5_000, 7_000):
        await service.post([CRASH] * events)
        await service.drained()
    await tab.shows('[data-v="loaded"]', "12,303")
    assert await tab.page.evaluate("shifts") == []
    assert await tab.page.evaluate("words") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_dead_letters_and_unknown_events_are_readable(
    database: str, make_service: Callable[..., Service], open_page: OpenPage, scheme: str
) -> None:
    service = await make_service(database_url=database, unknown_events="keep").start()
    await service.post([CRASH, {"event_name": "n" * 48, "k" * 60: "x" * 500, "also": 1}])
    await service.drained()
    Postgres.execute(database, "ALTER TABLE crash_report ADD CHECK (user_id > 0)")
    await service.post([{**CRASH, "user_id": -1, "message": "x" * 500}] * 3)
    await service.drained()
    for width in (1280, 360):
        size = {"width": width, "height": 800}
        tab = await open_page(service.url, color_scheme=scheme, viewport=size)
        for section, what in (("dead", "23514"), ("unknown", "a type that fits them")):
            assert await tab.page.locator(f"#{section}").is_hidden(), "it is one line"
            await tab.page.click(f"details:has(> #{section}) > summary")
            await tab.shows(f"#{section}", what)
        assert await tab.page.locator("button.danger").first.is_hidden(), "it asks first"
        await tab.page.click("#dead summary")
        assert await violations(tab) == []
        across = await tab.page.evaluate("document.documentElement.scrollWidth")
        assert across == width, "something sticks out"
    await tab.page.click("#dead button.danger")
    await tab.shows("#dead", "No dead letters.")
    await tab.page.click("details:has(> #unknown) > summary")
    await tab.page.click("#unknown summary")
    await tab.page.click("#unknown button.danger")
    await tab.shows("#unknown", "No events of unknown types are kept.")
