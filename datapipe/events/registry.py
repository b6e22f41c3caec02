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
from datapipe.events.types import PG_TYPES, Event, EventType, registered, unregistered
from datapipe.events.unknown import UNKNOWN, Kind, UnknownType
from datapipe.events.values import TIMES, parse_type, wire_type, written
from datapipe.settings import Settings, plugin
from datapipe.settings.values import seconds_of

# type, `?` for nullable, and the default as JSON: "bool = false"
_DECLARED = re.compile(r"\s*([^?=]+?)\s*(\?)?\s*(?:=\s*(.+))?", re.DOTALL)
_PATH = re.compile(r"[/\\]|^\.|\.py$")  # a file's, in place of a module's name

# of the table, not of an event: no field is called so
_OPTIONS = {
    "@partition": "__datapipe_partition__",
    "@retention": "__datapipe_retention__",
}


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

    Args:
        unknown: of the lane of events that have no type here.
        keeps_unknown: whether such events are accepted.
    Attributes:
        types: by event name; there is at least one.
        kinds: of all lanes that can be loaded, by lane. lanes: of those that events come into.
        by_struct: by the class of the decoded object.
        one: decodes one JSON object; `many` an array of them; both raise msgspec's errors.
    """

    def __init__(
        self,
        types: list[EventType],
        unknown: UnknownType | None = None,
        *,
        keeps_unknown: bool = False,
    ) -> None:
        self.types: dict[str, EventType] = {}
        for kind in types:
            if kind.name in self.types:
                raise ConfigError(f"event type {kind.name!r} is registered twice")
            self.types[kind.name] = kind
        self.unknown = unknown or UnknownType()
        self.keeps_unknown = keeps_unknown
        self.kinds: dict[str, Kind] = {**self.types, UNKNOWN: self.unknown}
        self.lanes = self.kinds if keeps_unknown else {**self.types}
        self.by_struct: dict[type, Any] = {kind.struct: kind for kind in self.kinds.values()}
        union: Any = Union[tuple(kind.struct for kind in types)]  # noqa: UP007 - made at run time
        self.one: msgspec.json.Decoder[Any] = msgspec.json.Decoder(union)
        self.many: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[union])

    def kind_of(self, event_name: str) -> Kind | None:
        """Of an event of this name; None: it is not accepted."""
        if kind := self.types.get(event_name):
            return kind
        return self.unknown if self.keeps_unknown and self.unknown.takes(event_name) else None


def load_registry(settings: Settings) -> Registry:
    """Import `event_modules`, read `events`, and gather every type.

    Their values and names are held to the limits of the sink that the settings name.

    Raises: ConfigError: names the module or the place in `events`; or there is no type at all.
    """
    for module in settings.event_modules:
        _import(module)
    if forgotten := unregistered(settings.event_modules):
        raise ConfigError(
            f"event_modules: {', '.join(forgotten)}: an event type that is not registered: write "
            '@register("its_name") above the class'
        )
    sink = plugin(settings, "sink")
    bounds = settings.input_max_len, sink.limits
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
    for kind in types:
        if (kind.partition or kind.retention_s) and not sink.has_partitions:
            raise ConfigError(
                f"event type {kind.name!r}: partition and retention are PostgreSQL's alone, not "
                f"{settings.sink_kind}'s: leave them out, or take a PostgreSQL as database_url"
            )
    keeps_unknown = settings.unknown_events == "keep"
    unknown = UnknownType(*bounds, retention_s=seconds_of(settings.unknown_retention))
    return Registry(types, unknown, keeps_unknown=keeps_unknown)


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
        if field in _OPTIONS:
            body[_OPTIONS[field]] = text
            continue
        if field.startswith("@"):
            raise ConfigError(f"{place}: no such option; there are {' and '.join(_OPTIONS)}")
        if not field.isidentifier() or field.startswith("__"):
            raise ConfigError(
                f"events.{name}: {field!r} can't be a key: letters, digits and _, not __ in front"
            )
        match = _DECLARED.fullmatch(text)
        try:
            kind = parse_type(match[1] if match else text)
            wire = wire_type(kind)
        except (ValueError, TypeError) as exc:
            allowed = ", ".join(kind.__name__ for kind in PG_TYPES)
            why = f" ({exc})" if isinstance(exc, TypeError) else ""
            raise ConfigError(
                f"{place}: {text!r} is not a type: one of {allowed}, list[...], dict[str, ...], "
                f"then '?' if it may be null, then '= default' as JSON{why}"
            ) from None
        hint: Any = kind | None if match and match[2] else kind
        body["__annotations__"][field] = hint
        if match and match[3] is not None:
            try:
                body[field] = msgspec.json.decode(
                    match[3], type=wire | None if match[2] else wire, **TIMES
                )
            except ValueError as exc:
                quotes = ", text in quotes" if kind is str else ""
                raise ConfigError(
                    f"{place}: the default {match[3]!r} must be {written(kind)} as JSON{quotes}: "
                    f"{exc}"
                ) from None
        elif match and match[2]:
            body[field] = None  # `datetime?`: the key may be left out too
    return type(name, (Event,), body)
