"""Event types: the class, its columns, and the way from a JSON object to a row. No I/O."""

from __future__ import annotations

import inspect
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
from datapipe.events.limits import Limits
from datapipe.events.rows import (
    DEFAULTS,
    NO_NUL,
    Field,
    compile_writer,
    has_longer_line,
    stored_bytes,
    too_long,
)
from datapipe.events.values import TIMES, wire_type, written
from datapipe.settings.values import seconds_of

# The names of release 1.0; each sink says what they are in its database.
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

NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
PARTITIONS = ("day", "week", "month")  # periods of `received_at`, in UTC
RESERVED = {"received_at", "event_name"}  # by us


class Column(NamedTuple):
    """One column of a lane's table; `default` is a value as rows hold it, but not escaped."""

    name: str
    type: str
    default: str | None = None


class Event:
    """The base of every event type: annotate the fields, then `register` the class."""


_E = TypeVar("_E", bound=type[Event])


def register(
    event_name: str = "", *, partition: str | None = None, retention: str | None = None
) -> Callable[[_E], _E]:
    """Make a class an event type of this name; its lane, table and page row follow.

    Args, for PostgreSQL alone:
        partition: day, week or month: the table has a partition for each, by `received_at` in UTC.
        retention: such as `90 days`: rows that were received before that are removed.
    Raises: ConfigError: there is no name, or it, a field or an option can't be used; the message
    says why.
    """
    given: object = event_name
    if isinstance(given, type):  # a bare `@register`
        raise _nameless(given)

    def mark(cls: _E) -> _E:
        if not event_name:
            raise _nameless(cls)
        cls.__datapipe_partition__ = partition  # type: ignore[attr-defined]
        cls.__datapipe_retention__ = retention  # type: ignore[attr-defined]
        EventType(event_name, cls)  # a wrong class fails where it is written
        cls.__datapipe_event_name__ = event_name  # type: ignore[attr-defined]
        return cls

    return mark


def _nameless(cls: type) -> ConfigError:
    return ConfigError(
        f"class {_path(cls)}: @register needs the name of the event type: "
        f'@register("{cls.__name__.lower()}")'
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def registered() -> list[tuple[str, type[Event]]]:
    """All registered classes that are alive in this process, by name."""
    found: dict[tuple[str, str], type[Event]] = {}
    for cls in _subclasses(Event):
        if name := _name_of(cls):
            found[name, _path(cls)] = cls  # a module was reloaded: the newer
    return sorted(((name, cls) for (name, _), cls in found.items()), key=lambda item: item[0])


def unregistered(modules: Sequence[str]) -> list[str]:
    """Classes of these modules, or of modules in them, that have fields and are no event types.

    Nor is any class made from them: they are no base that event types share.
    """
    known = {_path(cls) for _, cls in registered()}
    found = {
        _path(cls): None
        for cls in _subclasses(Event)
        if any(f"{cls.__module__}.".startswith(f"{module}.") for module in modules)
        and any(map(inspect.get_annotations, cls.__mro__))
        and not cls.__subclasses__()
    }
    return [path for path in found if path not in known]


def _subclasses(cls: type[Event]) -> Iterator[type[Event]]:
    """All that are alive, the older first."""
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _name_of(cls: type[Event]) -> str | None:
    name: str | None = cls.__dict__.get("__datapipe_event_name__")
    return name


class EventType:
    """One event type: decodes its objects and writes its rows.

    Attributes:
        fields: of the class, in its order.
        columns: the table's, in the order of the rows; `received_at` is the last one.
        partition: one of `PARTITIONS`, if the table is to have some.
        retention_s: for how long rows are kept; None: for ever.
        struct: what its objects are decoded into.
    """

    def __init__(
        self, name: str, cls: type[Event], input_max_len: int = 16_384, limits: Limits = DEFAULTS
    ) -> None:
        if not is_event_name(name, limits):
            raise ConfigError(
                f"event type {name!r}: a name is [a-z][a-z0-9_]{{0,47}} and does not begin with "
                f"{' or '.join(_taken(limits))}"
            )
        self.name = name
        self.partition, self.retention_s = _kept(name, cls)
        declared = list(_declared(name, cls, limits))
        self.fields = tuple(field for field, _ in declared)
        self.columns = (*(column for _, column in declared), Column("received_at", "timestamptz"))
        self._max_len = input_max_len
        wire = [(field.wire, field.wire_default) for field in self.fields]
        self.struct = self._struct(wire, tag=name)
        closer = [(field.exact_wire, field.wire_default) for field in self.fields]
        self._untagged = msgspec.json.Decoder(self._struct(closer), **TIMES)
        raw = [(msgspec.Raw | msgspec.UnsetType, msgspec.UNSET)] * len(wire)
        self._raw = msgspec.json.Decoder(self._struct(raw))
        self._plain = compile_writer(self.fields, input_max_len, escaped=False)
        self._escaped = compile_writer(self.fields, input_max_len, escaped=True)

    def _struct(
        self, members: Sequence[tuple[Any, Any]], tag: str | None = None
    ) -> type[msgspec.Struct]:
        """Members are called f0, f1, ...: a field may have any name."""
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
        end = f"{received_at}\n"
        text = end.join((self._plain if plain else self._escaped)(events)) + end
        most_bytes = 1 if text.isascii() else 4  # of a character
        most = self._max_len // most_bytes + len(self.fields) + len(end)
        if "\0" in text or has_longer_line(text, most):
            return None
        return text.encode()

    def look_closer(self, raw: bytes, received_at: str) -> bytes:
        """The row of one JSON object that failed the fast path. Raises: EventRejected: why."""
        try:
            event = self._untagged.decode(raw)
        except msgspec.ValidationError as exc:
            raise self._rejected(raw, exc) from None
        (row,) = self._escaped([event])
        values = row.split("\t")[:-1]
        for field, value in zip(self.fields, values, strict=True):
            if "\0" in value:
                raise field.wrong(NO_NUL)
        if sum(map(stored_bytes, values)) > self._max_len:
            raise too_long(self._max_len)
        return f"{row}{received_at}\n".encode()

    def _rejected(self, raw: bytes, error: msgspec.ValidationError) -> EventRejected:
        """The error of an object that does not decode: that of its first wrong field."""
        values = msgspec.structs.astuple(self._raw.decode(raw))
        for field, value in zip(self.fields, values, strict=True):
            if value is msgspec.UNSET:
                if field.default is msgspec.NODEFAULT:
                    return EventRejected(Reason.KEY_MISSING, f"{field.name}: this field is missing")
                continue
            try:
                msgspec.json.decode(value, type=field.exact_wire, **TIMES)
            except msgspec.ValidationError as why:
                return field.wrong(str(why))
        return EventRejected(Reason.BAD_VALUE, str(error))


def _kept(name: str, cls: type[Event]) -> tuple[str | None, int | None]:
    """The partition and the retention of a class itself. Raises: ConfigError: one is none."""
    own = vars(cls)
    partition = own.get("__datapipe_partition__")
    retention = own.get("__datapipe_retention__")
    if partition not in (None, *PARTITIONS):
        raise ConfigError(
            f"event type {name!r}: partition: {partition!r} is not one of {', '.join(PARTITIONS)}"
        )
    try:
        return partition, None if retention is None else seconds_of(retention)
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"event type {name!r}: retention: {exc}") from exc


def is_event_name(name: str, limits: Limits = DEFAULTS) -> bool:
    """Whether an event type may be called so."""
    return bool(NAME.fullmatch(name)) and not name.startswith(_taken(limits))


def _taken(limits: Limits) -> tuple[str, ...]:
    """What no name may begin with."""
    return ("datapipe_", *limits.reserved_tables)


def _declared(name: str, cls: type[Event], limits: Limits) -> Iterator[tuple[Field, Column]]:
    """The fields of a class and their columns. Raises: ConfigError: one can't be a column."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception as exc:
        raise ConfigError(f"event type {name!r}: an annotation can't be read: {exc}") from exc
    names = {"received_at"}
    for key, hint in hints.items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        place = f"event type {name!r}, field {key!r}"
        if key in RESERVED:
            raise ConfigError(f"{place}: this name is reserved: it can't be a column")
        if why := limits.column_fault(key, names):
            raise ConfigError(f"{place}: {why}")
        names.add(limits.folded(key))
        field = Field(key, *_not_null(place, hint), getattr(cls, key, msgspec.NODEFAULT), limits)
        try:
            default = field.default_text()
        except (ValueError, TypeError, OverflowError) as exc:
            raise ConfigError(f"{place}: default: {exc}") from exc
        yield field, Column(key, PG_TYPES[field.kind], default)


def _not_null(place: str, hint: Any) -> tuple[Any, bool]:
    """The type of a field's values but null, and whether they may be null. Raises: ConfigError."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    kinds = [option for option in options if option is not type(None)]
    if len(kinds) != 1:
        raise ConfigError(f"{place}: the only union that can be a column is X | None")
    if (typing.get_origin(kinds[0]) or kinds[0]) not in PG_TYPES:
        allowed = ", ".join(k.__name__ for k in PG_TYPES)
        raise ConfigError(f"{place}: {hint!r} is not one of {allowed}, or one of them | None")
    try:
        wire_type(kinds[0])
    except TypeError as exc:
        raise ConfigError(f"{place}: {written(kinds[0])}: {exc}") from None
    return kinds[0], len(options) > 1
