"""From a value to its text in a row, and the code that writes the rows of a type. No I/O.

A row is a line of PostgreSQL's COPY, text format: its values joined by tab and ended by newline;
backslash, tab, newline and carriage return inside a value are escaped, NULL is `\\N`.
Source: PostgreSQL documentation, COPY, "Text Format".

Rows are neutral: any database can be made to read them. Times are in UTC and have no offset, as
in `2026-11-25 12:00:00.123456`; bools are `True` and `False`, since release 1.0, which may meet
these rows during an upgrade, takes anything else in its dead letters to be false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, NamedTuple

import msgspec

from datapipe.errors import EventRejected, Reason

_INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_JSON = (dict, list)
_MAX_OFFSET_S = 57_600  # PostgreSQL takes less. Source: its datetime.h, MAX_TZDISP_HOUR
# U+0000 in JSON: behind an even number of backslashes, or the backslash is itself escaped
_NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

NO_NUL = "U+0000 can't be stored"
NULL = "\\N"
_ESCAPED = re.compile(r"\\.")


class Field(NamedTuple):
    """A field of an event class.

    Attributes: default: a Python value; msgspec.NODEFAULT when the key must be there.
    """

    name: str
    kind: type
    nullable: bool
    default: Any

    @property
    def wanted(self) -> str:
        """The type, for people."""
        kind = "int (64 bits)" if self.kind is int else self.kind.__name__
        return f"{kind} or null" if self.nullable else kind

    @property
    def wire(self) -> Any:
        """The type to decode: `dict` and `list` are kept as sent, so that no digit is lost."""
        if self.kind in _JSON:
            return msgspec.Raw
        kind: Any = _INT64 if self.kind is int else self.kind
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
        value: Any = msgspec.convert(self.default, _INT64 if self.kind is int else self.kind)
        is_json = self.kind in _JSON
        text = msgspec.json.encode(value).decode() if is_json else _TEXTS.get(self.kind, str)(value)
        if "\0" in text or (is_json and _NUL_IN_JSON.search(text)):
            raise ValueError(NO_NUL)
        return text

    def wrong(self, why: str) -> EventRejected:
        return EventRejected(Reason.BAD_VALUE, f"{self.name}: {self.wanted} wanted ({why})")


def too_long(max_len: int) -> EventRejected:
    return EventRejected(Reason.TOO_LONG, f"event longer than {max_len} bytes")


def compile_writer(
    fields: Sequence[Field], max_len: int, *, escaped: bool
) -> Callable[[Sequence[Any], str], list[str]]:
    """Code made for one type: a function of decoded objects and `received_at` that writes rows.

    An f-string takes two thirds of the time that filling a template from tuples takes. The source
    holds the numbers of the fields and nothing that anybody wrote.

    Args: escaped: whether a `str` may hold what must be. JSON may in any case: white space.
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
    row = "\\t".join([*values, "{at}"])
    source = f'lambda events, at: [f"{row}\\n" for e in events]'
    write_rows: Callable[[Sequence[Any], str], list[str]] = eval(source, names)  # nosec B307
    return write_rows


def _writer(field: Field, max_len: int, escaped: bool) -> Callable[[Any], str] | None:
    """What writes a value that is not null, where `str` does not do."""
    if field.kind in _JSON:
        return _json_writer(field, max_len)
    if field.kind is str:
        default = field.default_text() or ""  # it does not come with the body
        return escape if escaped or escape(default) != default else None
    text_of = _TEXTS.get(field.kind)
    if text_of is None:
        return None

    def write(value: Any) -> str:
        try:
            return text_of(value)
        except (OverflowError, ValueError):
            raise field.wrong("out of range") from None

    return write


def _json_writer(field: Field, max_len: int) -> Callable[[Any], str]:
    decoder = msgspec.json.Decoder(field.kind | None if field.nullable else field.kind)

    def write(raw: Any) -> str:
        """The JSON as it was sent; only looked through, and bounded first."""
        sent = bytes(raw)
        if len(sent) > max_len:
            raise too_long(max_len)
        try:
            value = decoder.decode(sent)
        except msgspec.ValidationError as exc:
            raise field.wrong(str(exc)) from None
        text = sent.decode()
        if _NUL_IN_JSON.search(text):
            raise field.wrong(NO_NUL)
        return NULL if value is None else escape(text)

    return write


def _datetime_text(value: datetime) -> str:
    """A time in UTC, as which one without a zone counts. Raises: OverflowError.

    Where UTC is before the year 1 or past 9999 it keeps its offset: PostgreSQL reads that, too.
    """
    if value.tzinfo is None:
        return str(value)
    try:
        return str(value.astimezone(UTC))[:-6]
    except OverflowError:
        offset = value.utcoffset()
        if offset is None or abs(offset.total_seconds()) >= _MAX_OFFSET_S:
            raise
        return str(value)


def _decimal_text(value: Decimal) -> str:
    """A number that `numeric` can hold: 131,072 digits before the point, 16,383 after it.

    Source: PostgreSQL documentation, "Numeric Types".
    """
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int) or value.adjusted() >= 131_072 or exponent < -16_383:
        raise OverflowError
    return str(value)


_TEXTS: dict[type, Callable[[Any], str]] = {datetime: _datetime_text, Decimal: _decimal_text}


def neutral_time(text: str) -> str:
    """A time that may have an offset as rows hold it. Raises: EventRejected: it is none."""
    try:
        return _datetime_text(msgspec.convert(text, datetime))
    except (msgspec.ValidationError, OverflowError) as exc:
        raise EventRejected(Reason.BAD_VALUE, f"a time wanted ({exc})") from None


def with_offset(text: str) -> str:
    """A time of a row, neutral or of release 1.0, with its offset: as one would send it."""
    return text if "+" in text or "-" in text[10:] else f"{text}+00:00"


def escape(text: str) -> str:
    text = text.replace("\\", "\\\\")  # before the others, which bring backslashes
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def stored_bytes(text: str) -> int:
    """How many bytes a value of a row has, once it is read."""
    return 0 if text == NULL else len(_ESCAPED.sub("_", text).encode())
