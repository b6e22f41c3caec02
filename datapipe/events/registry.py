"""The event types of one service: built in, from `event_modules`, from the setting `events`."""

from __future__ import annotations

import importlib
import os
import re
import sys
import sysconfig
from typing import Any, Union

import msgspec

from datapipe.errors import ConfigError
from datapipe.events.types import PG_TYPES, Event, EventType, registered
from datapipe.settings import Settings, plugin

_TYPE_NAMES = {kind.__name__: kind for kind in PG_TYPES}
# type, `?` for nullable, and the default as JSON: "bool = false"
_DECLARED = re.compile(r"\s*(\w+)\s*(\?)?\s*(?:=\s*(.+))?", re.DOTALL)
_PATH = re.compile(r"[/\\]|^\.|\.py$")  # a file's, in place of a module's name


class CrashReport(Event):
    user_id: int
    timestamp: int
    message: str


class Purchase(Event):
    user_id: int
    timestamp: int
    sku: str


class Install(Event):
    user_id: int
    timestamp: int


# Not registered: so a class of one of these names, or an entry of `events`, replaces it.
_BUILTIN: dict[str, type[Event]] = {
    "crash_report": CrashReport, "install": Install, "purchase": Purchase,
}  # fmt: skip


class Registry:
    """All event types, and decoders of their events.

    Attributes:
        types: by event name; there is at least one.
        by_struct: by the class of the decoded object.
        one: decodes one JSON object; `many` an array of them; both raise msgspec's errors.
    """

    def __init__(self, types: list[EventType]) -> None:
        self.types: dict[str, EventType] = {}
        for kind in types:
            if kind.name in self.types:
                raise ConfigError(f"event type {kind.name!r} is registered twice")
            self.types[kind.name] = kind
        self.by_struct = {kind.struct: kind for kind in types}
        union: Any = Union[tuple(kind.struct for kind in types)]  # noqa: UP007 - made at run time
        self.one: msgspec.json.Decoder[Any] = msgspec.json.Decoder(union)
        self.many: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[union])


def load_registry(settings: Settings) -> Registry:
    """Import `event_modules`, read `events`, and gather every type.

    Their values and names are held to the limits of the sink that the settings name.

    Raises: ConfigError: names the module or the place in `events`; or there is no type at all.
    """
    for module in settings.event_modules:
        _import(module)
    bounds = settings.input_max_len, plugin(settings, "sink").limits
    types = [EventType(name, cls, *bounds) for name, cls in registered()]
    taken = {kind.name for kind in types}
    for name, fields in settings.events.items():
        if name in taken:
            raise ConfigError(f"events.{name}: there is an event type of this name already")
        cls = declared_class(name, fields)
        try:
            types.append(EventType(name, cls, *bounds))
        except ConfigError as exc:
            raise ConfigError(f"events.{name}: {exc}") from exc
    if settings.builtin_events:
        taken = {kind.name for kind in types}
        types += [EventType(n, cls, *bounds) for n, cls in _BUILTIN.items() if n not in taken]
    if not types:
        raise ConfigError(
            "builtin_events: there is no event type: set it to true, or declare types in "
            "event_modules or events"
        )
    return Registry(types)


def _import(module: str) -> None:
    """Raises: ConfigError: it can't be; names the module, its form, and where it was looked for."""
    try:
        importlib.import_module(module)
    except ConfigError:
        raise
    except Exception as exc:
        why = f"{type(exc).__name__}: {exc}"
        if _PATH.search(module):
            parts = re.split(r"[./\\]+", module.removesuffix(".py"))
            why = f"write {'.'.join(filter(None, parts))!r}: package.module, not a file's path"
        elif isinstance(exc, ModuleNotFoundError) and f"{module}.".startswith(f"{exc.name}."):
            why = f"there is no {exc.name!r} (as package.module) in {', '.join(_looked_in())}"
        raise ConfigError(f"event_modules: {module!r} can't be imported: {why}") from exc


def _looked_in() -> list[str]:
    """Where modules are looked for, but for Python's own folders; the working folder is named."""
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    here = os.getcwd()
    paths = dict.fromkeys(os.path.abspath(path) for path in sys.path)
    return [
        f"{path} (the working folder)" if path == here else path
        for path in paths
        if os.path.isdir(path) and path not in own and not path.endswith("lib-dynload")
    ]


def declared_class(name: str, fields: dict[str, str]) -> type[Event]:
    """The class of an event type without code. Raises: ConfigError: names the place."""
    body: dict[str, Any] = {"__annotations__": {}}
    for field, text in fields.items():
        place = f"events.{name}.{field}"
        if not field.isidentifier() or field.startswith("__"):
            raise ConfigError(
                f"events.{name}: {field!r} can't be a key: letters, digits and _, not __ in front"
            )
        match = _DECLARED.fullmatch(text)
        if match is None or match[1] not in _TYPE_NAMES:
            raise ConfigError(
                f"{place}: {text!r} is no type: one of {', '.join(_TYPE_NAMES)}, then '?' if it "
                "may be null, then '= default' as JSON"
            )
        kind = _TYPE_NAMES[match[1]]
        hint: Any = kind | None if match[2] else kind
        body["__annotations__"][field] = hint
        if match[3] is not None:
            try:
                body[field] = msgspec.json.decode(match[3], type=hint)
            except ValueError as exc:
                quotes = ", text in quotes" if kind is str else ""
                raise ConfigError(
                    f"{place}: the default {match[3]!r} must be {kind.__name__} as JSON{quotes}: "
                    f"{exc}"
                ) from None
        elif match[2]:
            body[field] = None  # `datetime?`: the key may be left out too
    return type(name, (Event,), body)
