"""The setting `events`: event types without code, by the same rules; errors name the place."""

from __future__ import annotations

import gc
import re
import sys
import sysconfig
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from datapipe import Event, register
from datapipe.errors import ConfigError
from datapipe.events.registry import load_registry
from datapipe.events.types import EventType
from datapipe.settings import Settings

SIGNUP = {"user_id": "int", "plan": "str", "trial": "bool = false", "seen_at": "datetime?"}


class Signup(Event):
    user_id: int
    plan: str
    trial: bool = False
    seen_at: datetime | None = None


def test_it_is_what_the_class_would_be() -> None:
    declared = load_registry(Settings(events={"signup": SIGNUP})).types["signup"]
    written = EventType("signup", Signup)
    assert declared.columns == written.columns
    assert declared.fields == written.fields


class Basket(Event):
    tags: list[str]
    counts: dict[str, list[int | None]] = {"a": [1, None]}
    seen: list[datetime] | None = None
    rest: dict[str, Any] | None = None


def test_what_lists_and_dicts_hold_is_declared_as_in_a_class() -> None:
    fields = {
        "tags": " list[str] ", "counts": 'dict[str, list[int | None]] = {"a": [1, null]}',
        "seen": "list[datetime]?", "rest": "dict[str, Any]?",
    }  # fmt: skip
    declared = load_registry(Settings(events={"basket": fields})).types["basket"]
    written = EventType("basket", Basket)
    assert (declared.columns, declared.fields) == (written.columns, written.fields)


def test_keys_that_no_class_could_have() -> None:
    fields = {"from": "str", "class": "int = 1", "größe": "float?"}
    kind = load_registry(Settings(events={"x": fields})).types["x"]
    assert [column.name for column in kind.columns] == [*fields, "received_at"]


@pytest.mark.parametrize(
    ("name", "field", "text", "words"),
    [
        ("signup", "n", "integer", ["events.signup.n", "'integer'", "int, float"]),
        ("signup", "n", "", ["events.signup.n", "''"]),
        ("signup", "n", "int ??", ["events.signup.n", "'int ??'"]),
        ("signup", "n", "list[bytes]", ["events.signup.n", "'list[bytes]'", "list[...]"]),
        ("signup", "n", "list[int", ["events.signup.n", "'list[int'"]),
        ("signup", "n", "dict[int, str]", ["events.signup.n", "keys of a dict are str"]),
        ("signup", "n", "list[UUID | str]", ["events.signup.n", "UUID | str: in a union"]),
        ("signup", "n", "dict[str]", ["events.signup.n", "'dict[str]'"]),
        ("signup", "n", "list[__import__('os')]", ["events.signup.n", "is not a type"]),
        ("signup", "n", "int | str", ["events.signup", "'n'", "X | None"]),
        ("signup", "n", 'list[int] = ["x"]', ["events.signup.n", "list[int] as JSON", "$[0]"]),
        ("signup", "n", "int = x", ["events.signup.n", "'x'", "int as JSON"]),
        ("signup", "n", "int = null", ["events.signup.n", "'null'"]),
        ("signup", "n", "int = 9223372036854775808", ["events.signup.n", "<= 92233720"]),
        ("signup", "n", "str = free", ["events.signup.n", "'free'", "text in quotes"]),
        ("signup", "n", 'str = "\\u0000"', ["events.signup", "'n'", "U+0000"]),
        ("signup", "n", 'date = "soon"', ["events.signup.n", "soon", "date"]),
        ("signup", "", "int", ["events.signup", "''"]),
        ("signup", "a b", "int", ["events.signup", "'a b'"]),
        ("signup", "a\0", "int", ["events.signup", "'a\\x00'"]),
        ("signup", "\ud800", "int", ["events.signup", "'\\ud800'"]),
        ("signup", "__slots__", "str", ["events.signup", "'__slots__'"]),
        ("signup", "received_at", "int", ["events.signup", "'received_at'"]),
        ("signup", "x" * 64, "int", ["events.signup", "x" * 64]),
        ("Signup", "n", "int", ["events.Signup", "[a-z]"]),
    ],
)
def test_errors_name_the_place(name: str, field: str, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_registry(Settings(events={name: {field: text}}))
    for word in words:
        assert word in str(refused.value)


# --- the three that are built in ---


def test_an_entry_replaces_one_that_is_built_in() -> None:
    types = load_registry(Settings(events={"install": {"device": "str"}})).types
    assert sorted(types) == ["crash_report", "install", "purchase"]
    assert [field.name for field in types["install"].fields] == ["device"]


def test_a_class_replaces_one_that_is_built_in_and_not_one_of_your_own() -> None:
    @register("install")
    class Mine(Event):
        device: str

    try:
        types = load_registry(Settings()).types
        assert [field.name for field in types["install"].fields] == ["device"]
        with pytest.raises(ConfigError, match=r"events\.install: there is an event type"):
            load_registry(Settings(events={"install": {"n": "int"}}))
    finally:
        del Mine
        gc.collect()  # a registered class counts while it lives


def test_without_those_that_are_built_in() -> None:
    registry = load_registry(Settings(builtin_events=False, events={"signup": SIGNUP}))
    assert list(registry.types) == ["signup"]
    sent = b'{"event_name": "signup", "user_id": 1, "plan": "pro"}'
    assert type(registry.one.decode(sent)) is type(registry.many.decode(b"[%s]" % sent)[0])
    with pytest.raises(ConfigError, match="builtin_events: there is no event type"):
        load_registry(Settings(builtin_events=False))


# --- event_modules ---


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("no_such.x", ["there is no 'no_such' (as package.module) in ", "(the working folder)"]),
        ("json.no_such", ["there is no 'json.no_such' (as package.module)"]),
        ("shop/events.py", ["write 'shop.events'", "not a file's path"]),
        ("./events.py", ["write 'events'"]),
        ("shop.py", ["write 'shop'"]),
        (r"shop\events", ["write 'shop.events'"]),
        ("needs_another", ["ModuleNotFoundError: No module named 'another_one'"]),
    ],
)  # fmt: skip
def test_a_module_that_is_not_there_is_named_with_its_form_and_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, words: list[str]
) -> None:
    (tmp_path / "needs_another.py").write_text("import another_one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    with pytest.raises(ConfigError) as refused:
        load_registry(Settings(event_modules=[module]))
    text = str(refused.value)
    assert text.startswith(f"event_modules: {module!r} can't be imported: ")
    for word in words:
        assert word in text
    assert sysconfig.get_path("stdlib") not in re.split(", | in ", text)


# --- classes that are no event types, though they look like it ---


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """One that is gone afterwards, with its classes: they count while they live."""
    module = ModuleType("own_events")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]
    vars(module).clear()
    gc.collect()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("@register\nclass Login(Event): user: str", ["own_events.Login", '@register("login")']),
        ("@register()\nclass Login(Event): user: str", ["own_events.Login", '@register("login")']),
        ("class Login(Event): user: str", ["event_modules", "own_events.Login", "not registered"]),
        ("class Base(Event): user: str\nclass Login(Base): pass", ["own_events.Login"]),
    ],
)
def test_a_class_that_is_not_registered_is_named(
    module: ModuleType, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        exec(f"from datapipe import Event, register\n{text}", vars(module))
        load_registry(Settings(event_modules=["own_events"]))
    for word in words:
        assert word in str(refused.value)
    assert "Base" not in str(refused.value)


def test_a_base_of_event_types_and_one_without_fields_need_no_name(module: ModuleType) -> None:
    text = """
from datapipe import Event, register
class Marker(Event): pass
class Base(Event): user: str
@register("login")
class Login(Base): pass
"""
    exec(text, vars(module))
    login = load_registry(Settings(event_modules=["own_events"])).types["login"]
    assert [field.name for field in login.fields] == ["user"]


# --- options of the table ---


def test_options_of_a_class_and_of_an_entry_are_the_same() -> None:
    fields = {"n": "int", "@partition": "week", "@retention": "90 days"}
    declared = load_registry(Settings(events={"kept": fields})).types["kept"]

    @register("kept_too", partition="week", retention="90 days")
    class Kept(Event):
        n: int

    written = EventType("kept_too", Kept)
    assert [column.name for column in declared.columns] == ["n", "received_at"]
    for kind in (declared, written):
        assert (kind.partition, kind.retention_s) == ("week", 90 * 86_400)

    @register("not_kept")
    class NotKept(Kept):
        m: int

    inherited = EventType("not_kept", NotKept)
    assert (inherited.partition, inherited.retention_s) == (None, None)
    del Kept, NotKept, written, inherited, kind
    gc.collect()


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("@partition", "hour", ["'x'", "partition", "'hour'", "day, week, month"]),
        ("@retention", "soon", ["'x'", "retention", "'soon'", "'90 days'"]),
        ("@retention", "0 days", ["'x'", "retention", "'0 days'"]),
        ("@retain", "1 day", ["events.x.@retain", "@partition and @retention"]),
    ],
)
def test_wrong_options(option: str, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_registry(Settings(events={"x": {"n": "int", option: text}}))
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("option", [{"@partition": "day"}, {"@retention": "1 day"}])
@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://u@h/d"])
def test_options_are_for_postgresql_alone(url: str, option: dict[str, str]) -> None:
    events = {"x": {"n": "int", **option}}
    load_registry(Settings(events=events, database_url="postgresql://h/d"))
    with pytest.raises(ConfigError, match=r"'x': .*PostgreSQL's alone, not .*: leave them out"):
        load_registry(Settings(events=events, database_url=url))
