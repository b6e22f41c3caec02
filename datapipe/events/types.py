"""Event types: the class, its columns, and the way from a JSON object to a row. No I/O."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from datapipe.errors import ConfigError, EventRejected, Reason
from datapipe.events.rows import NO_NUL, Field, compile_writer, stored_bytes, too_long

# The names are PostgreSQL's; each sink says what they are in its database.
PG_TYPES: dict[type, str] = {
    int: "bigint",
    float: "double precision",
    str: "text",
    bool: "boolean",
    datetime: "timestamptz",
    date: "date",
    Decimal: "numeric",
    UUID: "uuid",
    dict: "jsonb",
    list: "jsonb",
}

_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
# Ours, and PostgreSQL's. Source: its documentation, "System Columns"
_RESERVED = {"received_at", "event_name", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}


class Column(NamedTuple):
    """One column of a lane's table; `default` is a value as rows hold it, but not escaped."""

    name: str
    type: str
    default: str | None = None


class Event:
    """The base of every event type: annotate the fields, then `register` the class."""


_E = TypeVar("_E", bound=type[Event])


def register(event_name: str) -> Callable[[_E], _E]:
    """Make a class an event type of this name; its lane, table and page row follow.

    Raises: ConfigError: the name or a field can't be used; the message says why.
    """

    def mark(cls: _E) -> _E:
        EventType(event_name, cls)  # a wrong class fails where it is written
        cls.__datapipe_event_name__ = event_name  # type: ignore[attr-defined]
        return cls

    return mark


def registered() -> list[tuple[str, type[Event]]]:
    """All registered classes that are alive in this process, by name."""
    found: dict[tuple[str, str, str], type[Event]] = {}
    pending = list(Event.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending += cls.__subclasses__()
        if name := cls.__dict__.get("__datapipe_event_name__"):
            found[name, cls.__module__, cls.__qualname__] = cls  # a module loaded anew: the newer
    return sorted(((name, cls) for (name, *_), cls in found.items()), key=lambda item: item[0])


class EventType:
    """One event type: decodes its objects and writes its rows.

    Attributes:
        fields: of the class, in its order.
        columns: the table's, in the order of the rows; `received_at` is the last one.
        struct: what its objects are decoded into.
    """

    def __init__(self, name: str, cls: type[Event], input_max_len: int = 2048) -> None:
        if not _NAME.fullmatch(name) or name.startswith("datapipe_"):
            raise ConfigError(
                f"event type {name!r}: a name is [a-z][a-z0-9_]{{0,47}} and does not begin with "
                "datapipe_"
            )
        self.name = name
        declared = list(_declared(name, cls))
        self.fields = tuple(field for field, _ in declared)
        self.columns = (*(column for _, column in declared), Column("received_at", "timestamptz"))
        self._max_len = input_max_len
        wire = [(field.wire, field.wire_default) for field in self.fields]
        self.struct = self._struct(wire, tag=name)
        self._untagged = msgspec.json.Decoder(self._struct(wire))
        raw = [(msgspec.Raw | msgspec.UnsetType, msgspec.UNSET)] * len(wire)
        self._raw = msgspec.json.Decoder(self._struct(raw))
        self._plain = compile_writer(self.fields, input_max_len, escaped=False)
        self._escaped = compile_writer(self.fields, input_max_len, escaped=True)

    def _struct(
        self, members: Sequence[tuple[Any, Any]], tag: str | None = None
    ) -> type[msgspec.Struct]:
        """Members are called f0, f1, ...: the names of fields may be any."""
        return msgspec.defstruct(
            self.name,
            [(f"f{i}", *member) for i, member in enumerate(members)],
            kw_only=True,
            gc=False,
            rename={f"f{i}": field.name for i, field in enumerate(self.fields)},
            tag_field="event_name" if tag else None,
            tag=tag,
        )

    def rows(self, events: Sequence[Any], received_at: str, *, plain: bool = False) -> bytes | None:
        """The rows of decoded events, or None: one of them needs `look_closer`.

        Args:
            received_at: a time as rows hold it.
            plain: the body had no backslash, so no text can hold a control character (JSON
                allows them only escaped): there is nothing to escape.
        Raises: EventRejected: a value is out of range.
        """
        lines = (self._plain if plain else self._escaped)(events, received_at)
        text = "".join(lines)
        most_bytes = 1 if text.isascii() else 4  # of a character
        if len(text) * most_bytes > self._max_len:
            longest = max(map(len, lines)) - len(self.fields) - len(received_at) - 1
            if longest * most_bytes > self._max_len:
                return None
        return None if "\0" in text else text.encode()

    def look_closer(self, raw: bytes, received_at: str) -> bytes:
        """The row of one JSON object that did not pass at once. Raises: EventRejected: why."""
        try:
            event = self._untagged.decode(raw)
        except msgspec.ValidationError as exc:
            raise self._rejected(raw, exc) from None
        (row,) = self._escaped([event], received_at)
        values = row.split("\t")[:-1]
        for field, value in zip(self.fields, values, strict=True):
            if "\0" in value:
                raise field.wrong(NO_NUL)
        if sum(map(stored_bytes, values)) > self._max_len:
            raise too_long(self._max_len)
        return row.encode()

    def _rejected(self, raw: bytes, error: msgspec.ValidationError) -> EventRejected:
        """The error of an object that does not decode: of its first field that is not right."""
        values = msgspec.structs.astuple(self._raw.decode(raw))
        for field, value in zip(self.fields, values, strict=True):
            if value is msgspec.UNSET:
                if field.default is msgspec.NODEFAULT:
                    return EventRejected(Reason.KEY_MISSING, f"{field.name}: this key is missing")
                continue
            try:
                msgspec.json.decode(value, type=field.wire)
            except msgspec.ValidationError as why:
                return field.wrong(str(why))
        return EventRejected(Reason.BAD_VALUE, str(error))


def _declared(name: str, cls: type[Event]) -> Iterator[tuple[Field, Column]]:
    """The fields of a class and their columns. Raises: ConfigError: one can't be a column."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception as exc:
        raise ConfigError(f"event type {name!r}: an annotation can't be read: {exc}") from exc
    for key, hint in hints.items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        place = f"event type {name!r}, field {key!r}"
        if key in _RESERVED or len(key.encode()) > 63:
            raise ConfigError(f"{place}: this name can't be used for a column of one's own")
        field = Field(key, *_kind(place, hint), getattr(cls, key, msgspec.NODEFAULT))
        try:
            default = field.default_text()
        except (ValueError, TypeError, OverflowError) as exc:
            raise ConfigError(f"{place}: default: {exc}") from exc
        yield field, Column(key, PG_TYPES[field.kind], default)


def _kind(place: str, hint: Any) -> tuple[type, bool]:
    """The type of a field's values, and whether they may be null. Raises: ConfigError."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    kinds = [option for option in options if option is not type(None)]
    if len(kinds) != 1:
        raise ConfigError(f"{place}: of unions only X | None can be a column")
    kind = typing.get_origin(kinds[0]) or kinds[0]
    if kind not in PG_TYPES:
        allowed = ", ".join(k.__name__ for k in PG_TYPES)
        raise ConfigError(f"{place}: {hint!r} is none of {allowed}, or one of them | None")
    return kind, len(options) > 1
