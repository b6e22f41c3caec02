"""What it costs that many ask for all numbers at the same moment."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from datapipe.http import responses
from datapipe.http.pages import Pages


class Made:
    """Stands in for the status, and counts how many answers are being made of it."""

    def __init__(self) -> None:
        self.now = self.most = self.ended = 0
        self.records = SimpleNamespace(refusals=list)

    async def refresh(self) -> None:
        await asyncio.sleep(0)

    async def whole(self) -> dict[str, Any]:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        return {}

    async def of_data_dir(self) -> tuple[dict[str, Any], list[Any]]:
        return await self.whole(), []

    def end(self, *_: Any) -> str:
        self.now -= 1
        self.ended += 1
        return ""


@pytest.mark.parametrize("path", ["page", "status_json", "metrics"])
async def test_few_answers_are_made_at_once_however_many_ask(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = Made()
    denied = SimpleNamespace(detail="no")
    access: Any = SimpleNamespace(may_look=lambda _: None, why_not=lambda _: denied)
    any: Any = SimpleNamespace(kept=False, text=made.end)
    looked = Pages(made, any, any, any, access, any, any)
    looked.add_to(web.Application())
    looked._templates = SimpleNamespace(page=made.end)  # type: ignore[assignment]
    monkeypatch.setattr(responses, "plain", made.end)
    show = getattr(looked, path)
    await asyncio.gather(*(show(make_mocked_request("GET", "/")) for _ in range(50)))
    assert (made.ended, made.now) == (50, 0)
    assert made.most == 4
