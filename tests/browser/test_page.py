"""The status page in a real browser: numbers, outage, load now, restart, without scripts."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.async_api import expect

from tests.browser.chromium import OpenPage
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import Service, until

CRASH = {"event_name": "crash_report", "user_id": 1, "timestamp": 2, "message": "boom"}
INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 2}
DEPTH = "[data-draw=total] [data-chart=depth] .readout"


def drawn(path: str | None) -> list[float]:
    """The values that a path shows, oldest first."""
    shape = re.fullmatch(r"M\d+ -[\d.]+L((?:\d+ [\d.]+ ?)+)H189V-[\d.]+Z", path or "")
    assert shape, path
    return [float(value) for value in shape[1].split()[1::2]]


async def test_outage_is_told_and_its_end(
    own_postgres: Postgres, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    service = await make_service(database_url=own_postgres.create_database()).start()
    await service.post([CRASH] * 3)
    tab = await open_page(service.url)
    await tab.shows("#sentence", "Healthy")
    await tab.shows('[data-v="loaded"]', "3")

    own_postgres.stop()
    await service.post([CRASH] * 40)
    await tab.shows("#sentence", "PostgreSQL does not answer (since")
    sentence = await tab.text("#sentence")
    assert "UTC): " in sentence
    assert "Events are kept, 40 waiting, room for" in sentence
    assert await tab.page.get_attribute(".summary", "data-is") == "database_down"
    await tab.shows(DEPTH, "40 waiting")

    own_postgres.start()
    await tab.shows("#sentence", "Healthy")
    await tab.shows('[data-v="books.waiting"]', "0")
    await expect(tab.page.locator(DEPTH)).to_have_text("0 waiting", timeout=20_000)
    assert await tab.value("loaded") == "43"
    depths = drawn(await tab.page.get_attribute("[data-draw=total] path.waiting", "d"))
    assert max(depths) > 0  # it had risen
    assert depths[-1] == 0  # and fell


async def test_load_now_by_mouse_and_keyboard(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    service = await make_service(database_url=database, load_interval=300).start()
    tab = await open_page(service.url)
    await service.post([CRASH] * 1200 + [INSTALL])
    await tab.shows('[data-v="books.waiting"]', "1,201")
    await tab.page.get_by_role("button", name="Load now").click()
    await tab.shows("#load-result", "Loaded rows: crash_report 1,200, install 1.")
    await tab.shows('[data-v="books.waiting"]', "0")
    assert await tab.page.locator("#load-progress").is_hidden()

    await tab.page.get_by_role("button", name="Load now").focus()
    await tab.page.keyboard.press("Enter")
    await tab.shows("#load-result", "Nothing was waiting.")


async def test_page_lives_through_a_restart(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    service = await make_service(database_url=database, port=free_port()).start()
    tab = await open_page(service.url)
    await service.post([CRASH] * 5)
    await service.drained()
    await tab.shows('[data-v="loaded"]', "5")
    assert await service.stop() == 0
    await tab.shows("#sentence", "No connection to datapipe since")
    await tab.shows("#announcer", "No connection")

    await service.start()
    await tab.live()
    await tab.shows("#sentence", "Healthy")
    await service.post(INSTALL)
    accepted = tab.page.locator('#accounts [data-v="accepted"]')
    await expect(accepted).to_have_text("1", timeout=20_000)
    refused = [text for text in tab.complaints if "ERR_CONNECTION_REFUSED" not in text]
    tab.complaints = [text for text in refused if "ERR_INCOMPLETE_CHUNKED" not in text]


async def test_what_the_reader_does_stays_while_numbers_change(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    """Focus, an open explanation, how far a table is scrolled, what is selected."""
    service = await make_service(database_url=database, load_interval=0.1).start()
    for _ in range(12):
        await service.post([CRASH] * 3)
        await service.drained()
    tab = await open_page(service.url, viewport={"width": 390, "height": 844})
    await tab.page.click("#accounts + details summary")
    await tab.page.evaluate(
        """() => {
          const table = document.getElementById("loads_table");
          table.focus();
          table.scrollTop = 100;
          getSelection().selectAllChildren(document.querySelector("#types tbody th"));
        }"""
    )
    before = await tab.text("#uptime")
    await service.post([CRASH] * 7)
    await tab.shows('#accounts [data-v="loaded"]', "43")
    await expect(tab.page.locator("#uptime")).not_to_have_text(before)
    assert await tab.page.evaluate(
        """() => [
          document.activeElement.id, document.getElementById("loads_table").scrollTop,
          document.querySelector("#accounts + details").open, getSelection().toString().trim(),
        ]"""
    ) == ["loads_table", 100, True, "crash_report"]


async def test_without_scripts(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    service = await make_service(database_url=database, load_interval=300).start()
    await service.post([CRASH] * 7)
    await service.post({"event_name": "nonesuch"})
    tab = await open_page(service.url, java_script_enabled=False)
    assert await tab.value("books.waiting") == "7"
    assert "7 events waiting" in await tab.text("#sentence")
    assert "nonesuch" in await tab.text("#refusals")
    assert await tab.page.locator(".plot svg").count() == 2  # of all types
    assert await tab.page.locator("svg.small").count() == 2 * 3
    await tab.page.get_by_role("button", name="Load now").click()
    await tab.page.wait_for_url(f"{service.url}/")
    assert await tab.value("books.waiting") == "0"
    assert await tab.value("rows") == "7"


async def test_what_came_from_outside_is_text(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    service = await make_service(database_url=database).start()
    tab = await open_page(service.url)
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    status, _ = await service.post({"event_name": evil}, headers={"X-Request-ID": "evil-1"})
    assert status == 400
    await tab.shows("#refusals", "evil-1")
    assert evil in (await tab.text("#refusals")).replace('\\"', '"')
    assert await tab.value("unsupported_event") == "1"
    assert await tab.page.locator("#refusals img, #refusals script").count() == 0
    await tab.page.reload()
    await tab.live()
    await service.post(CRASH)
    await tab.shows('[data-v="accepted"]', "1")  # seconds later they are still there
    assert evil in (await tab.text("#refusals")).replace('\\"', '"')
    assert await tab.page.title() == "datapipe: healthy"


async def test_pictures_show_what_was_before(
    database: str, make_service: Callable[..., Service], open_page: OpenPage
) -> None:
    """By hover and by keyboard; without a script as well, but for these."""
    service = await make_service(database_url=database).start()
    await service.post([CRASH] * 50)

    async def there() -> bool:
        series = (await service.status())["history"]["total"]
        return any(series["accepted"])

    await until(there)
    plain = await open_page(service.url, java_script_enabled=False)
    tab = await open_page(service.url)
    plot = tab.page.locator("[data-draw=total] [data-chart=rate] .plot")
    readout = tab.page.locator("[data-draw=total] [data-chart=rate] .readout")
    await plot.hover()
    await expect(readout).to_contain_text("not known")  # half of 15 minutes ago
    await tab.page.mouse.move(0, 0)
    await plot.focus()
    await tab.page.keyboard.press("End")
    told = set()
    for _ in range(6):
        told.add(await plot.get_attribute("aria-valuetext") or "")
        await tab.page.keyboard.press("ArrowLeft")
    assert any(re.search(r"UTC, (\d|10)\.?\d? accepted per s", text) for text in told), told
    assert any("0 accepted" not in text for text in told), told
    assert await plot.get_attribute("role") == "slider"
    path = "[data-draw=total] path.accepted"
    alive = drawn(await tab.page.get_attribute(path, "d"))
    opened = drawn(await plain.page.get_attribute(path, "d"))
    assert alive[: len(opened)] == opened
    assert max(opened) > 0
