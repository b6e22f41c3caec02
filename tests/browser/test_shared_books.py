"""The page where machines share a mirror: the equation that holds there, in both schemes."""

from __future__ import annotations

from typing import Any

import pytest

from datapipe import testing
from datapipe.monitor.peers import Heard
from tests.browser.chromium import OpenPage
from tests.browser.test_looks import violations
from tests.doubles.shared_books import share

INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 2}
TERMS = ["taken", "= loaded", "+ duplicate", "+ dead", "+ returned", "+ in hand", "balanced",
         "accepted", "waiting"]  # fmt: skip
NUMBERS = ["10", "5", "0", "0", "2", "3", "\N{CHECK MARK}", "8", "1,003"]


async def one_is_silent(*_: Any) -> Heard:
    return Heard((), ["web2.internal.example.com:4711"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("script", [True, False])
async def test_what_was_taken_is_accounted_for(
    open_page: OpenPage, scheme: str, script: bool
) -> None:
    async with testing.service(load_interval=300) as service:
        await service.post([INSTALL] * 5)
        await service.rows("install")
        await service.post([INSTALL] * 3)
        share(service.pipeline.status)
        service.pipeline.status.peers.ask = one_is_silent  # type: ignore[method-assign]
        for width in (1280, 360):
            tab = await open_page(
                service.url.rstrip("/"), color_scheme=scheme, java_script_enabled=script,
                viewport={"width": width, "height": 800},
            )  # fmt: skip
            await tab.page.click("#types th a >> text=install")
            opened = tab.page.locator("#type-install .equation").first
            await opened.wait_for()
            assert await opened.locator("dt").all_text_contents() == TERMS
            assert await opened.locator("dd").all_text_contents() == NUMBERS
            assert "in NATS only" in await tab.text("#type-install .more")
            assert await tab.text("#accounts h2") == "Every event is accounted for"
            assert "No answer from web2.internal" in await tab.text("#sentence")
            assert "1 process, 1 silent" in await tab.text("#uptime")
            assert await tab.text("#mirror") == "NATS"
            assert "up, shared by all processes" in await tab.text("#mirror_facts")
            names = await tab.page.locator("#types tbody th").all()
            heights = [(await name.bounding_box() or {})["height"] for name in names]
            assert max(heights) < 40, "a name wraps"
            across = await tab.page.evaluate("document.documentElement.scrollWidth")
            assert across == width, "something sticks out"
            if script:
                assert await violations(tab) == []
            await tab.page.context.close()  # before the service ends, which it would tell
