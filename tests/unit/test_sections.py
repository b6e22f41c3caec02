"""What open pages cost: the HTML of a view is made once for all who look, and not too often."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from datapipe.http import assets
from datapipe.http.assets import Sections, Templates
from datapipe.monitor import charts
from datapipe.monitor.feed import News
from datapipe.monitor.overview import View

A, B = View(q="a"), View(q="b")


class Counted(Templates):
    """Counts what is rendered, instead; each says of which status it is."""

    def __init__(self) -> None:
        self.made: Counter[View | None] = Counter()

    def sections(self, status: Mapping[str, Any]) -> dict[str, str]:
        self.made[None] += 1
        return {"tiles": status["n"]}

    def of_view(self, status: Mapping[str, Any], view: View) -> dict[str, str]:
        self.made[view] += 1
        return {"types": f"{status['n']} {view.q}"}


def news(n: str) -> News:
    return News({"n": n}, {}, fresh=False)


async def shown(sections: Sections, news: News, view: View) -> Mapping[str, str]:
    """To somebody who has just come."""
    return (await sections.since(0, news, [], view))[1]


async def test_all_who_see_the_same_share_what_was_rendered(monkeypatch: Any) -> None:
    monkeypatch.setattr(assets, "_REST", 0)
    templates = Counted()
    sections, first = Sections(templates), news("1")
    for _ in range(3):
        assert await shown(sections, first, A) == {"tiles": "1", "types": "1 a"}
        assert await shown(sections, first, B) == {"tiles": "1", "types": "1 b"}
    assert templates.made == {None: 1, A: 1, B: 1}
    assert await shown(sections, news("2"), A) == {"tiles": "2", "types": "2 a"}
    assert templates.made == {None: 2, A: 2, B: 1}


async def test_a_new_view_is_shown_at_once_and_news_after_a_rest(monkeypatch: Any) -> None:
    monkeypatch.setattr(assets, "_REST", 1e9)
    sections = Sections(Counted())
    assert (await shown(sections, news("1"), A))["tiles"] == "1"
    assert await shown(sections, news("2"), A) == {"tiles": "1", "types": "1 a"}
    assert await shown(sections, news("2"), B) == {"tiles": "1", "types": "1 b"}


async def test_to_wait_for_a_core_earns_no_rest() -> None:
    class Waiting(Counted):
        def sections(self, status: Mapping[str, Any]) -> dict[str, str]:
            time.sleep(0.2)  # in a thread, as a busy machine would have it wait
            return super().sections(status)

    sections = Sections(Waiting())
    assert (await shown(sections, news("1"), A))["tiles"] == "1"
    await asyncio.sleep(0.1)  # by the wall clock the rest would be 1.8 s
    assert (await shown(sections, news("2"), A))["tiles"] == "2"


async def test_thousands_of_views_take_no_memory_nor_hold_up_news_for_long(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(assets, "_REST", 1e9)
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 1e-6
        return now

    clocks = SimpleNamespace(monotonic=monotonic, thread_time=monotonic)
    monkeypatch.setattr(assets, "time", clocks)
    templates = Counted()
    sections, first = Sections(templates), news("1")
    views = [View(q=str(n)) for n in range(3000)]
    numbers = []
    for view in views:
        numbers.append((await sections.since(0, first, [], view))[0])
    assert len(sections._of_views) == 64
    for number, view in zip(numbers, views, strict=True):
        assert await sections.since(number, first, [], view) == (number, {})
    assert set(templates.made.values()) == {1}, "what a reader has is not made again for it"
    now = 29.0
    assert (await shown(sections, news("2"), A))["tiles"] == "1"
    now = 30.1
    assert (await shown(sections, news("2"), A))["tiles"] == "2"


def test_a_small_chart_is_as_high_as_its_highest_point_and_ends_at_the_newest() -> None:
    assert charts.small([]) == charts.small([0.0] * 180) == ""
    assert charts.small([0.0, 0.0, 5.0, 10.0]) == "M58 20V20h1V0h1V20Z"
    full = charts.small([1.0] * 180)
    assert full == f"M0 20{'V0h1' * 60}V20Z"
    assert charts.small([1e9] + [0.1] * 3) == "M58 20V0h1V19h1V20Z", "little is not nothing"
