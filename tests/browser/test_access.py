"""What a reader who may not act sees, and how the page lives behind an admin key."""

from __future__ import annotations

from collections.abc import Callable

from playwright.async_api import Browser

from tests.browser.chromium import OpenPage, Tab
from tests.service import Service

CRASH = {"event_name": "crash_report", "user_id": 1, "timestamp": 2, "message": "boom"}


async def test_no_button_where_the_reader_may_not_act(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    """The service listens beyond this machine, and no admin key is set."""
    service = await make_service(database_url=database, host="0.0.0.0").start()
    url = service.url.replace("0.0.0.0", "127.0.0.1")
    service.url = url
    await service.post({"event_name": "secret_type"})
    tab = await open_page(url)
    assert await tab.page.get_by_role("button", name="Load now").count() == 0
    assert "set admin_key" in await tab.text(".now .hint")
    assert await tab.value("unsupported_event") == "1"
    assert "secret_type" not in await tab.page.content()
    assert (await service.get("/refused"))[0] == 403
    async with service.session.post(f"{url}/load") as response:
        assert response.status == 403


async def test_page_behind_an_admin_key(
    database: str, make_service: Callable[..., Service], browser: Browser, open_page: OpenPage
) -> None:
    service = make_service(database_url=database, admin_key="Schlüssel", load_interval=300)
    await service.start()
    async with service.session.get(f"{service.url}/") as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Basic ")
    asked = {"username": "any", "password": "Schlüssel"}  # sent once the browser is asked for it
    page = await (await browser.new_context(http_credentials=asked)).new_page()
    response = await page.goto(service.url)
    assert response is not None
    assert response.status == 200
    key = {"http_credentials": {"username": "any", "password": "Schlüssel", "send": "always"}}
    tab = await open_page(service.url, **key)
    await service.post([CRASH] * 3)
    await tab.shows('[data-v="books.waiting"]', "3")
    await tab.page.get_by_role("button", name="Load now").click()
    await tab.shows("#load-result", "Loaded rows: crash_report 3.")


async def test_another_site_can_not_press_the_button(
    database: str, make_service: Callable[..., Service], browser: Browser
) -> None:
    """A form on a page of another origin, sent by a real browser."""
    service = await make_service(database_url=database, load_interval=300).start()
    await service.post([CRASH] * 3)
    page = await (await browser.new_context()).new_page()
    form = f'<form method="post" action="{service.url}/load"><button>x</button></form>'
    await page.route("http://evil.test/", lambda route: route.fulfill(
        body=form, content_type="text/html"
    ))  # fmt: skip
    await page.goto("http://evil.test/")
    async with page.expect_response(f"{service.url}/load") as answered:
        await page.get_by_role("button").click()
    assert (await answered.value).status == 403
    assert (await service.status())["books"]["waiting"] == 3
    tab = await Tab.open(browser, service.url)
    await tab.page.get_by_role("button", name="Load now").click()
    await tab.shows("#load-result", "Loaded rows: crash_report 3.")
