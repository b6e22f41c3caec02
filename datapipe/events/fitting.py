"""A declaration, as in the setting `events`, that fits events that were seen. No I/O.

It says what such events could be, as far as some of them tell: a person reads it before it is used.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

import msgspec

from datapipe.events.limits import Limits
from datapipe.events.rows import DEFAULTS
from datapipe.events.types import RESERVED
from datapipe.events.values import TIMES, wire_type

_MOST_KEYS = 200  # of a declaration; a table of more columns helps nobody

# Texts that nobody would write and mean something else. msgspec alone takes 32 digits for a UUID.
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ].+")


class _Float(str):
    """A number with a point or an exponent, as it was sent."""


_events = msgspec.json.Decoder(dict[str, Any], float_hook=_Float)


def fitting(events: Iterable[str], limits: Limits = DEFAULTS) -> dict[str, str]:
    """The keys of these events and their types, those seen most often first.

    A key that was missing, or null, may be null. What no column can hold is left out: keys whose
    values are of types that don't go together, and those that can't be the name of a column.
    """
    values: defaultdict[str, list[Any]] = defaultdict(list)
    count = 0
    for event in events:
        try:
            decoded = _events.decode(event)
        except (msgspec.MsgspecError, RecursionError):  # of so many digits, or nested so deep
            continue
        count += 1
        for key, value in decoded.items():
            values[key].append(value)
    values.pop("event_name", None)
    fields: dict[str, str] = {}
    names = {"received_at"}
    for key, seen in sorted(values.items(), key=lambda item: -len(item[1])):
        if len(fields) == _MOST_KEYS or not _may_be_a_column(key, names, limits):
            continue
        given = [value for value in seen if value is not None]
        kind = _common(given)
        if kind is not None:
            names.add(limits.folded(key))
            fields[key] = kind + "?" * (len(given) < count)
    return fields


def _may_be_a_column(key: str, others: set[str], limits: Limits) -> bool:
    if not key.isidentifier() or key.startswith("__") or key in RESERVED:
        return False
    return limits.column_fault(key, others) is None


def _common(values: Sequence[Any]) -> str | None:
    """The name of the type that all of these have, or None; of none, `str`."""
    kinds = {_kind(value) for value in values}
    if kinds <= {"int", "float", "Decimal"} and kinds:
        return next(kind for kind in ("Decimal", "float", "int") if kind in kinds)
    if kinds == {"date", "datetime"}:
        return "datetime"
    if len(kinds) > 1:
        return "str" if kinds <= {"str", "UUID", "date", "datetime"} else None
    return kinds.pop() if kinds else "str"


def _kind(value: Any) -> str:
    """The name of the narrowest type of a value that is not null."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "Decimal"
    if isinstance(value, _Float):
        return "float" if math.isfinite(float(value)) else "Decimal"
    if isinstance(value, str):
        return _kind_of_text(value)
    return "dict" if isinstance(value, dict) else "list"


def _kind_of_text(text: str) -> str:
    forms: Sequence[tuple[re.Pattern[str], type]]
    forms = ((_UUID, UUID), (_DATE, date), (_TIME, datetime))
    for form, kind in forms:
        if form.fullmatch(text):
            try:
                msgspec.convert(text, wire_type(kind), **TIMES)
            except msgspec.ValidationError:
                return "str"
            return kind.__name__
    return "str"
