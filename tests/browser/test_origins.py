"""Events from pages of other origins, in a real browser: fetch, sendBeacon, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from playwright.async_api import Browser, Page

from tests.service import Service, until

POST = """
async ([url, headers, user]) => {
  const event = {event_name: 'install', user_id: user, timestamp: 1};
  try {
    const answer = await fetch(url, {method: 'POST', headers, body: JSON.stringify(event)});
    return [answer.status, answer.headers.get('X-Request-ID'), await answer.json()];
  } catch (error) { return String(error); }
}"""
BEACON = """
([url, type, user]) => {
  const text = JSON.stringify({event_name: 'install', user_id: user, timestamp: 1});
  return navigator.sendBeacon(url, type ? new Blob([text], {type}) : text);
}"""


@asynccontextmanager
async def shop() -> AsyncIterator[str]:
    """The origin of a site with one empty page."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>shop</title>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    async with TestServer(app) as server:
        yield str(server.make_url("/")).rstrip("/")


@pytest.fixture
def visit(browser: Browser) -> Callable[[str], Any]:
    async def visit(url: str) -> Page:
        page = await (await browser.new_context()).new_page()
        await page.goto(url)
        return page

    return visit


async def accepted(service: Service) -> int:
    lanes = (await service.status())["lanes"]
    return int(lanes["install"]["accepted"]) if "install" in lanes else 0


async def test_fetch_and_beacon_of_a_listed_origin(
    database: str, make_service: Callable[..., Service], visit: Callable[[str], Any]
) -> None:
    async with shop() as origin:
        service = await make_service(
            database_url=database, cors_origins=[origin], ingest_keys=["k"]
        ).start()
        page = await visit(origin)
        headers = {
            "Authorization": "Bearer k", "Content-Type": "application/json",
            "Idempotency-Key": "a", "X-Request-ID": "mine",
        }  # fmt: skip
        for _ in range(2):  # the second is sent again: it counts once
            answer = await page.evaluate(POST, [f"{service.url}/", headers, 1])
            assert answer == [200, "mine", {"status_code": 0, "status_message": "ok"}]
        # why it was refused can be read, too
        status, _, body = await page.evaluate(POST, [f"{service.url}/", {}, 1])
        assert (status, body["status_code"]) == (401, 8)
        assert await page.evaluate(BEACON, [f"{service.url}/?key=k", "", 2])

        async def there() -> bool:
            return await accepted(service) == 3

        await until(there, what="the beacon")
        books = await service.drained()
        assert (books["loaded"], books["duplicate"]) == (2, 1)
        # the page of the service itself is closed to it
        for path in ("status.json", "load"):
            assert "TypeError" in await page.evaluate(
                "url => fetch(url, {method: url.endsWith('load') ? 'POST' : 'GET'})"
                ".then(a => a.status, String)", f"{service.url}/{path}",
            )  # fmt: skip


async def test_another_origin_can_do_what_a_form_could(
    database: str, make_service: Callable[..., Service], visit: Callable[[str], Any]
) -> None:
    """Its script sees no answer and sets no header; a plain beacon is taken if no key is wanted."""
    async with shop() as listed, shop() as other:
        service = await make_service(database_url=database, cors_origins=[listed]).start()
        page = await visit(other)
        key = {"Idempotency-Key": "a"}
        assert "TypeError" in await page.evaluate(POST, [f"{service.url}/", key, 1])
        assert await accepted(service) == 0
        assert await page.evaluate(BEACON, [f"{service.url}/", "", 2])

        async def there() -> bool:
            return await accepted(service) == 1

        await until(there, what="the plain beacon")


async def test_a_beacon_of_json_is_not_sent(
    database: str, make_service: Callable[..., Service], visit: Callable[[str], Any]
) -> None:
    """docs/clients.md says so: for it the browser wants its own credentials to be allowed."""
    async with shop() as origin:
        service = await make_service(database_url=database, cors_origins=[origin]).start()
        page = await visit(origin)
        failed: list[str] = []
        page.on("requestfailed", lambda request: failed.append(request.method))
        await page.evaluate(BEACON, [f"{service.url}/", "application/json", 1])

        async def told() -> bool:
            return bool(failed)

        await until(told, what="the browser's refusal")
        assert await accepted(service) == 0
