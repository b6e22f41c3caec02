"""`datapipe new-event` prints a class that works as it stands."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from datapipe.cli.new_event import class_text
from datapipe.errors import ConfigError
from datapipe.events.types import EventType


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """One that is gone afterwards, with its classes: a registered one counts while it lives."""
    module = ModuleType("made_by_new_event")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]
    vars(module).clear()
    gc.collect()


def test_the_class_can_be_used_as_printed(module: ModuleType) -> None:
    text = class_text(
        "trial_signup",
        ["user_id:int", 'plan:str = "free"', "seen_at:datetime?", "price:Decimal", "tags:list",
         "days:dict[str, list[date | None]] = {}", "rest:dict[str, Any]?"],
    )  # fmt: skip
    assert "class TrialSignup(Event):" in text
    assert "    plan: str = 'free'\n" in text
    assert "    seen_at: datetime | None = None\n" in text
    assert "    days: dict[str, list[date | None]] = {}\n" in text
    assert "    rest: dict[str, Any] | None = None\n" in text
    exec(compile(text, "made", "exec"), vars(module))
    kind = EventType("other_name", module.TrialSignup)
    assert [column.type for column in kind.columns] == [
        "bigint", "text", "timestamptz", "numeric", "jsonb", "jsonb", "jsonb", "timestamptz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("Bad Name", [], "Bad Name"), ("x", ["user_id"], "user_id"), ("x", ["a:text"], "text"),
        ("x", ["a:int", "a:int"], "twice"), ("x", ["received_at:datetime"], "received_at"),
        ("x", ["a b:int"], "a b"), ("x", ["class:str"], "class"),
        ("x", ["at:date = \"2020-01-01\""], "by hand"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_told(name: str, fields: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        class_text(name, fields)
