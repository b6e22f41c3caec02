"""Event types: the class, its columns, and the way from a JSON object to a COPY row. No I/O.

A COPY row (text format) is its values joined by tab and ended by newline; backslash, tab, newline
and carriage return inside a value are escaped, NULL is `\\N`.
Source: PostgreSQL documentation, COPY, "Text Format".
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from datapipe.errors import ConfigError, EventRejected, Reason

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
_OURS = frozenset({"received_at", "event_name"})
# Source: PostgreSQL documentation, "System Columns"
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
_INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

# Rows are put together with control characters between the values and exchanged for COPY's own
# afterwards: so that a whole batch is escaped by a handful of C-speed replacements.
_FIELD, _ROW, _NULL = "\x1f", "\x1e", "\x1d"


class Column(NamedTuple):
    """One column of a lane's table; `default` is an SQL expression."""

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
        EventType(event_name, cls)  # a wrong class is told where it is written
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


class _Field(NamedTuple):
    name: str
    kind: type
    nullable: bool
    default: Any  # msgspec.NODEFAULT when the key must be there

    @property
    def wanted(self) -> str:
        kind = "int (64 bits)" if self.kind is int else self.kind.__name__
        return f"{kind} or null" if self.nullable else kind


class EventType:
    """One event type: decodes its objects and writes its rows.

    `columns` are the table's, in the order of the rows; `received_at` is the last one.
    """

    def __init__(self, name: str, cls: type[Event], input_max_len: int = 2048) -> None:
        if not _NAME.fullmatch(name) or name.startswith("datapipe_"):
            raise ConfigError(
                f"event type {name!r}: a name is [a-z][a-z0-9_]{{0,47}} and does not begin with "
                "datapipe_"
            )
        self.name = name
        self.fields = _fields(name, cls)
        self.columns = (
            *(Column(f.name, PG_TYPES[f.kind], _sql_default(name, f)) for f in self.fields),
            Column("received_at", "timestamptz"),
        )
        self._max_len = input_max_len
        self._template = _FIELD.join(["%s"] * len(self.fields) + [""])
        self._decoders = {f.name: msgspec.json.Decoder(_wire_type(f)) for f in self.fields}
        self.struct = self._make_struct(tag=name)
        self._loose = msgspec.json.Decoder(self._make_struct(tag=None))
        self._raw_fields = msgspec.json.Decoder(_raw_struct(self.fields))
        self.keeps_json = any(f.kind in (dict, list) for f in self.fields)
        self._has_nulls = any(f.nullable for f in self.fields)
        self._converters = [
            (i, convert) for i, f in enumerate(self.fields) if (convert := self._converter(f))
        ]
        self._plain_lines = self._make_plain_lines()

    def _make_struct(self, tag: str | None) -> type[msgspec.Struct]:
        return msgspec.defstruct(
            self.name,
            [(f"f{i}", _wire_type(f), _wire_default(f)) for i, f in enumerate(self.fields)],
            kw_only=True,
            gc=False,
            rename={f"f{i}": f.name for i, f in enumerate(self.fields)},
            tag_field="event_name" if tag else None,
            tag=tag,
        )

    def _converter(self, field: _Field) -> Callable[[Any], Any] | None:
        """What makes text of a value where `str` does not; None is for NULL and passes."""
        if field.kind in (dict, list):
            decoder = msgspec.json.Decoder(field.kind | None if field.nullable else field.kind)
            return lambda raw: self._json_text(field, decoder, raw)
        convert = _CONVERTERS.get(field.kind)
        if convert is None:
            return None
        return lambda value: None if value is None else _in_range(field, convert, value)

    def rows(self, events: Sequence[Any], received_at: str, *, plain: bool = False) -> bytes | None:
        """The COPY rows of decoded events, or None: one of them needs `row` to look at it.

        Args:
            received_at: a timestamp as PostgreSQL reads it.
            plain: the body had no backslash, so no value can hold a control character (JSON
                allows them only escaped): there is nothing to escape.
        Raises: EventRejected: a value is out of range.
        """
        if plain:
            return self._plain_rows(events, received_at)
        template = f"{self._template}{received_at}{_ROW}"
        nulls = 0
        if self._has_nulls or self._converters:
            values = [self._converted(event) for event in events]
            nulls = sum(each.count(None) for each in values)
            lines = [template % _mark_nulls(each) for each in values]
        else:
            lines = [template % msgspec.structs.astuple(event) for event in events]
        text = "".join(lines)
        longest = max(map(len, lines)) - len(self.fields) - len(received_at) - 1
        if longest * (1 if text.isascii() else 4) > self._max_len:
            return None
        data = text.encode()
        if (
            data.count(b"\x1f") != len(lines) * len(self.fields)
            or data.count(b"\x1e") != len(lines)
            or b"\0" in data
            or data.count(b"\x1d") != nulls
        ):
            return None
        return _to_copy(data)

    def _plain_rows(self, events: Sequence[Any], received_at: str) -> bytes | None:
        lines = self._plain_lines(events, received_at)
        text = "".join(lines)
        widest = 1 if text.isascii() else 4
        if len(text) * widest > self._max_len:
            longest = max(map(len, lines)) - len(self.fields) - len(received_at) - 1
            if longest * widest > self._max_len:
                return None
        return text.encode()

    def _make_plain_lines(self) -> Callable[[Sequence[Any], str], list[str]]:
        """Code made for this type: a function of events and time that writes them by an f-string.

        It takes 150 us for 1,000 rows of `crash_report`, a template filled from tuples 190. The
        source holds the numbers of the fields and nothing that anybody wrote.
        """
        convert = dict(self._converters)
        names: dict[str, Any] = {f"c{i}": convert[i] for i in convert} | {"NULL": "\\N"}
        values = []
        for i, field in enumerate(self.fields):
            value = f"c{i}(e.f{i})" if i in convert else f"e.f{i}"
            if field.nullable:
                value = f"NULL if (v := {value}) is None else v"
            values.append(f"{{({value})}}")
        row = "\\t".join([*values, "{at}"])
        source = f'lambda events, at: [f"{row}\\n" for e in events]'
        make: Callable[[Sequence[Any], str], list[str]] = eval(source, names)  # nosec B307
        return make

    def row(self, event: Any, received_at: str) -> bytes:
        """The COPY row of one decoded event. Raises: EventRejected: code 5 or 6."""
        size, texts = 0, []
        for field, value in zip(self.fields, self._converted(event), strict=True):
            if value is None:
                texts.append(b"\\N")
                continue
            text = str(value).encode()
            if b"\0" in text:
                raise EventRejected(Reason.BAD_VALUE, f"{field.name}: U+0000 can't be stored")
            size += len(text)
            texts.append(_escape(text))
        if size > self._max_len:
            raise EventRejected(Reason.TOO_LONG, f"event longer than {self._max_len} bytes")
        return b"\t".join([*texts, received_at.encode()]) + b"\n"

    def look_closer(self, raw: bytes, received_at: str) -> bytes:
        """The row of one JSON object that did not pass at once. Raises: EventRejected: why."""
        try:
            return self.row(self._loose.decode(raw), received_at)
        except msgspec.ValidationError as exc:
            values = self._raw_fields.decode(raw)
            for i, field in enumerate(self.fields):
                value = getattr(values, f"f{i}")
                if value is msgspec.UNSET:
                    if field.default is msgspec.NODEFAULT:
                        detail = f"{field.name}: this key is missing"
                        raise EventRejected(Reason.KEY_MISSING, detail) from None
                    continue
                try:
                    self._decoders[field.name].decode(value)
                except msgspec.ValidationError as why:
                    raise _wrong_value(field, str(why)) from None
            raise EventRejected(Reason.BAD_VALUE, str(exc)) from None

    def _converted(self, event: Any) -> tuple[Any, ...]:
        values = list(msgspec.structs.astuple(event))
        for i, convert in self._converters:
            values[i] = convert(values[i])
        return tuple(values)

    def _json_text(self, field: _Field, decoder: msgspec.json.Decoder[Any], raw: Any) -> str | None:
        """The JSON of a `dict` or `list` as it was sent; only looked through, and bounded first."""
        text = bytes(raw)
        if len(text) > self._max_len:
            raise EventRejected(Reason.TOO_LONG, f"event longer than {self._max_len} bytes")
        try:
            value = decoder.decode(text)
        except msgspec.ValidationError as exc:
            raise _wrong_value(field, str(exc)) from None
        if value is None:
            return None
        if b"\\u0000" in text and _has_nul(value):
            raise EventRejected(Reason.BAD_VALUE, f"{field.name}: U+0000 can't be stored")
        return text.decode()


def _fields(name: str, cls: type[Event]) -> tuple[_Field, ...]:
    try:
        hints = typing.get_type_hints(cls)
    except Exception as exc:
        raise ConfigError(f"event type {name!r}: an annotation can't be read: {exc}") from exc
    fields = []
    for key, hint in hints.items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        place = f"event type {name!r}, field {key!r}"
        if key in _OURS or key in _SYSTEM_COLUMNS or len(key.encode()) > 63:
            raise ConfigError(f"{place}: this name can't be used for a column of one's own")
        kind, nullable = _kind(place, hint)
        default = getattr(cls, key, msgspec.NODEFAULT)
        fields.append(_Field(key, kind, nullable, default))
        _sql_default(name, fields[-1])
    return tuple(fields)


def _kind(place: str, hint: Any) -> tuple[type, bool]:
    nullable = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(rest) == len(typing.get_args(hint)) or len(rest) != 1:
            raise ConfigError(f"{place}: of unions only X | None can be a column")
        hint, nullable = rest[0], True
    kind = typing.get_origin(hint) or hint
    if kind not in PG_TYPES:
        allowed = ", ".join(k.__name__ for k in PG_TYPES)
        raise ConfigError(f"{place}: {hint!r} is none of {allowed}, or one of them | None")
    return kind, nullable


def _wire_type(field: _Field) -> Any:
    if field.kind in (dict, list):
        return msgspec.Raw  # kept as sent: numbers lose nothing on the way
    kind: Any = _INT64 if field.kind is int else field.kind
    return kind | None if field.nullable else kind


def _wire_default(field: _Field) -> Any:
    if field.default is not msgspec.NODEFAULT and field.kind in (dict, list):
        return msgspec.Raw(msgspec.json.encode(field.default))
    return field.default


def _raw_struct(fields: Iterable[_Field]) -> type[msgspec.Struct]:
    named = list(enumerate(fields))
    return msgspec.defstruct(
        "RawFields",
        [(f"f{i}", msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for i, _ in named],
        rename={f"f{i}": f.name for i, f in named},
    )


def _sql_default(name: str, field: _Field) -> str | None:
    """The column's default as an SQL expression. Raises: ConfigError: not of the field's type."""
    if field.default is msgspec.NODEFAULT or field.default is None:
        if field.default is None and not field.nullable:
            raise ConfigError(f"event type {name!r}, field {field.name!r}: the default is no None")
        return None
    wanted: Any = _INT64 if field.kind is int else field.kind
    try:
        value = msgspec.convert(field.default, wanted)
        if field.kind in (dict, list):
            text = msgspec.json.encode(value).decode()
        elif field.kind is datetime:
            text = _datetime_text(value)
        else:
            text = str(value)
    except (msgspec.ValidationError, TypeError, OverflowError) as exc:
        raise ConfigError(f"event type {name!r}, field {field.name!r}: default: {exc}") from exc
    if "\0" in text or _has_nul(value):
        raise ConfigError(f"event type {name!r}, field {field.name!r}: default holds U+0000")
    return f"'{text.replace(chr(39), chr(39) * 2)}'::{PG_TYPES[field.kind]}"


def _wrong_value(field: _Field, why: str) -> EventRejected:
    return EventRejected(Reason.BAD_VALUE, f"{field.name}: {field.wanted} wanted ({why})")


def _in_range(field: _Field, convert: Callable[[Any], str], value: Any) -> str:
    try:
        return convert(value)
    except (OverflowError, ValueError):
        raise _wrong_value(field, "out of range") from None


def _datetime_text(value: datetime) -> str:
    """A time as PostgreSQL reads it; without a zone it is UTC. Raises: OverflowError."""
    offset = value.utcoffset()
    if offset is None:
        return f"{value}+00:00"
    # PostgreSQL takes offsets below 16 h. Source: its datetime.h, MAX_TZDISP_HOUR
    return str(value if abs(offset.total_seconds()) < 57600 else value.astimezone(UTC))


def _decimal_text(value: Decimal) -> str:
    """A number that `numeric` can hold: 131,072 digits before the point, 16,383 after it.

    Source: PostgreSQL documentation, "Numeric Types".
    """
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int) or value.adjusted() >= 131_072 or exponent < -16_383:
        raise OverflowError
    return str(value)


_CONVERTERS: dict[type, Callable[[Any], str]] = {
    datetime: _datetime_text,
    Decimal: _decimal_text,
}


def _has_nul(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\0" in item:
                return True
        elif isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return False


def _mark_nulls(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([_NULL if value is None else value for value in values])


def _escape(value: bytes) -> bytes:
    return (
        value.replace(b"\\", b"\\\\")
        .replace(b"\t", b"\\t")
        .replace(b"\n", b"\\n")
        .replace(b"\r", b"\\r")
    )


def _to_copy(data: bytes) -> bytes:
    """Escape what stands in the values, then exchange our separators for COPY's."""
    data = _escape(data).replace(b"\x1f", b"\t").replace(b"\x1e", b"\n")
    return data.replace(b"\x1d", b"\\N") if b"\x1d" in data else data
