"""A real headless Chromium, the system's own."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    assert program, "chromium is missing: run tools/test-needs"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


class Tab:
    """An open status page, and what its console said."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    @classmethod
    async def open(cls, browser: Browser, url: str, **context: Any) -> Tab:
        """Open the page; returns once it is alive, or without scripts once it is there."""
        page = await (await browser.new_context(**context)).new_page()
        tab = cls(page)
        await page.goto(f"{url}/")
        if context.get("java_script_enabled", True):
            await tab.live()
        return tab

    async def live(self) -> None:
        await self.shows("#link", "live")

    async def shows(self, selector: str, text: str, timeout_s: float = 30.0) -> None:
        """Wait until the first such element holds this text, and nothing else beside it."""
        found = self.page.locator(selector).first
        await found.filter(has_text=text).wait_for(state="attached", timeout=timeout_s * 1000)

    async def text(self, selector: str) -> str:
        return (await self.page.locator(selector).first.inner_text()).strip()

    async def value(self, path: str) -> str:
        """What stands on the page for a path of /status.json."""
        return await self.text(f'[data-v="{path}"]')


OpenPage = Callable[..., Awaitable[Tab]]
