"""Rows: the values of an event, and how they are written.

A row is a line of text: its values joined by tab and ended by newline; backslash, tab, newline and
carriage return inside a value are escaped, NULL is `\\N`. Bulk loads of databases read it as it is.

Rows are neutral: any database can be made to read them. Times are in UTC and have no offset, as
in `2026-11-25 12:00:00.123456`; bools are `True` and `False`, because release 1.0, which may load
these rows during an upgrade, reads anything else in its dead letters as false.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from datapipe.errors import EventRejected, Reason
from datapipe.events.limits import Limits
from datapipe.events.values import TIMES, wire_type, written, wrong_inside

_JSON = (dict, list)
DEFAULTS = Limits()
# U+0000 in JSON: behind an even number of backslashes, or the backslash is itself escaped
NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

NO_NUL = "U+0000 can't be stored"
TOO_DEEP = "nested too deep to be stored"
NULL = "\\N"
_ESCAPED = re.compile(r"\\.")


class Field(NamedTuple):
    """A field of an event class.

    Attributes:
        hint: its annotation, without `| None`.
        default: a Python value; msgspec.NODEFAULT when the key must be there.
    """

    name: str
    hint: Any
    nullable: bool
    default: Any
    limits: Limits = DEFAULTS

    @property
    def kind(self) -> type:
        """Which column it has: of `list[str]`, list."""
        kind: type = typing.get_origin(self.hint) or self.hint
        return kind

    @property
    def wanted(self) -> str:
        """The type, for people."""
        return f"{_said(self.hint)} or null" if self.nullable else _said(self.hint)

    @property
    def wire(self) -> Any:
        """The type to decode: `dict` and `list` are kept as sent, so that no digit is lost."""
        return self._or_null(self.kind) if self.kind is datetime else self.exact_wire

    @property
    def exact_wire(self) -> Any:
        """The same for decoders with `TIMES`, which read more times and are slower."""
        return msgspec.Raw if self.kind in _JSON else self.value_type

    @property
    def value_type(self) -> Any:
        """The type of its values, for decoders with `TIMES`."""
        return self._or_null(wire_type(self.hint))

    def _or_null(self, kind: Any) -> Any:
        return kind | None if self.nullable else kind

    @property
    def wire_default(self) -> Any:
        if self.kind in _JSON and self.default is not msgspec.NODEFAULT:
            return msgspec.Raw(msgspec.json.encode(self.default))
        return self.default

    def default_text(self) -> str | None:
        """The default as rows hold it, not escaped; None: there is none, or null.

        Raises: ValueError, TypeError, OverflowError: it can't be a value of the field.
        """
        if self.default is msgspec.NODEFAULT or (self.default is None and self.nullable):
            return None
        value: Any = msgspec.convert(self.default, wire_type(self.hint), **TIMES)
        is_json = self.kind in _JSON
        if is_json:
            text = msgspec.json.encode(value).decode()
        else:
            text = self.limits.texts.get(self.kind, str)(value)
        if "\0" in text or (is_json and NUL_IN_JSON.search(text)):
            raise ValueError(NO_NUL)
        if is_json and self.limits.is_too_deep(value, text.encode()):
            raise ValueError(TOO_DEEP)
        return text

    def wrong(self, why: str) -> EventRejected:
        return EventRejected(Reason.BAD_VALUE, f"{self.name}: must be {self.wanted}: {why}")

    def misfit(self, sent: bytes, error: msgspec.ValidationError) -> EventRejected:
        """Why a value, which was sent as this JSON, does not decode: of the place within it."""
        place, hint = wrong_inside(sent, self.hint)
        if not place:
            return self.wrong(str(error))
        why = str(error).partition(" - at ")[0]
        detail = f"{self.name}{place}: must be {_said(hint)}: {why}"
        return EventRejected(Reason.BAD_VALUE, detail)


def _said(hint: Any) -> str:
    return "int (64 bits)" if hint is int else written(hint)


def too_long(max_len: int) -> EventRejected:
    detail = f"event longer than {max_len} bytes, which input_max_len sets"
    return EventRejected(Reason.TOO_LONG, detail)


def compile_writer(
    fields: Sequence[Field], max_len: int, *, escaped: bool
) -> Callable[[Sequence[Any]], list[str]]:
    """Code made for one type: a function of decoded objects that writes rows but for their ends.

    An f-string takes two thirds of the time that filling a template from tuples takes. The source
    holds the numbers of the fields and nothing that anybody wrote.

    Args: escaped: whether a `str` may hold what must be escaped. JSON always may: white space.
    Returns: a function that raises EventRejected: a value is out of range.
    """
    names: dict[str, Any] = {"NULL": NULL}
    values = []
    for i, field in enumerate(fields):
        value = f"e.f{i}"
        if write := _writer(field, max_len, escaped):
            names[f"w{i}"] = write
            value = f"w{i}({value})"
        values.append(
            f"{{NULL if e.f{i} is None else {value}}}" if field.nullable else f"{{{value}}}"
        )
    row = "".join([f"{value}\\t" for value in values])
    write_rows: Callable[[Sequence[Any]], list[str]]
    write_rows = eval(f'lambda events: [f"{row}" for e in events]', names)  # nosec B307
    return write_rows


def _writer(field: Field, max_len: int, escaped: bool) -> Callable[[Any], str] | None:
    """The function that writes a value that is not null, where `str` is not enough."""
    if field.kind in _JSON:
        return _json_writer(field, max_len)
    if field.kind is str:
        default = field.default_text() or ""  # it is not part of the body
        return escape if escaped or escape(default) != default else None
    text_of = field.limits.texts.get(field.kind)
    if text_of is None:
        return None

    def write(value: Any) -> str:
        try:
            return text_of(value)
        except (OverflowError, ValueError):
            raise field.wrong("out of range") from None

    return write


def _json_writer(field: Field, max_len: int) -> Callable[[Any], str]:
    decoder = msgspec.json.Decoder(field.value_type, **TIMES)

    def write(raw: Any) -> str:
        """The JSON as it was sent; checked, but not rewritten; its size is bounded first."""
        sent = bytes(raw)
        if len(sent) > max_len:
            raise too_long(max_len)
        try:
            value = decoder.decode(sent)
        except msgspec.ValidationError as exc:
            raise field.misfit(sent, exc) from None
        text = sent.decode()
        if NUL_IN_JSON.search(text):
            raise field.wrong(NO_NUL)
        if field.limits.is_too_deep(value, sent):
            raise field.wrong(TOO_DEEP)
        return NULL if value is None else escape(text)

    return write


def neutral_time(text: str) -> str:
    """A time, with or without an offset, as rows hold it. Raises: EventRejected: it is none."""
    try:
        return DEFAULTS.texts[datetime](msgspec.convert(text, datetime))
    except (msgspec.ValidationError, OverflowError) as exc:
        raise EventRejected(Reason.BAD_VALUE, f"must be a time: {exc}") from None


def with_offset(text: str) -> str:
    """A time of a row, neutral or of release 1.0, with its offset: as a client would send it."""
    return text if "+" in text or "-" in text[10:] else f"{text}+00:00"


def has_longer_line(text: str, most: int) -> bool:
    """Whether a line, with its newline, is longer. A look at the last one that ends within `most`
    characters passes over many.
    """
    start = 0
    while len(text) - start > most:
        start = text.rfind("\n", start, start + most) + 1
        if not start:
            return True
    return False


def escape(text: str) -> str:
    text = text.replace("\\", "\\\\")  # before the others, which bring backslashes
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def stored_bytes(text: str) -> int:
    """How many bytes a value of a row has once it is unescaped."""
    return 0 if text == NULL else len(_ESCAPED.sub("_", text).encode())
