"""Fixtures of the browser tests: a Chromium, and pages that may not complain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.browser.chromium import OpenPage, Tab, chromium


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def open_page(browser: Browser) -> AsyncIterator[OpenPage]:
    """Opens pages; in the end none of them may have said a word on its console."""
    tabs: list[Tab] = []

    async def open_page(url: str, **context: Any) -> Tab:
        tab = await Tab.open(browser, url, **context)
        tabs.append(tab)
        return tab

    yield open_page
    assert [tab.complaints for tab in tabs if tab.complaints] == []
