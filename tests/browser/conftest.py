"""Fixtures of the browser tests: a Chromium, and pages that may not complain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.browser.chromium import OpenPage, Tab, chromium
from tests.service import Service, made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All in the loop of the session: a Chromium belongs to the loop that started it."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def browser(shared_browser: Browser) -> AsyncIterator[Browser]:
    """A Chromium for all tests; what one of them opened in it is closed behind it."""
    yield shared_browser
    for context in shared_browser.contexts:
        await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def make_service(tmp_path: Path) -> AsyncIterator[Callable[..., Service]]:
    """See `tests.service.made`."""
    async with made(tmp_path) as make:
        yield make


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: Browser) -> AsyncIterator[OpenPage]:
    """Opens pages; in the end none of them may have said a word on its console."""
    tabs: list[Tab] = []

    async def open_page(url: str, **context: Any) -> Tab:
        tab = await Tab.open(browser, url, **context)
        tabs.append(tab)
        return tab

    yield open_page
    assert [tab.complaints for tab in tabs if tab.complaints] == []
