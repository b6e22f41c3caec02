"""`datapipe new-event`: the class of a new event type, to be pasted into your own module."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

from datapipe.errors import ConfigError
from datapipe.events.registry import declared_class
from datapipe.events.types import EventType
from datapipe.events.values import written

_IMPORTS = {
    "datetime": "from datetime import datetime",
    "date": "from datetime import date",
    "Decimal": "from decimal import Decimal",
    "Any": "from typing import Any",
    "UUID": "from uuid import UUID",
}


def class_text(name: str, fields: Sequence[str]) -> str:
    """The module's text for `NAME field:type ...`; types as in the setting `events`.

    Raises: ConfigError: names the field that is wrong.
    """
    declared: dict[str, str] = {}
    for field in fields:
        key, colon, text = field.partition(":")
        if not colon or not key.isidentifier():
            raise ConfigError(f"{field!r} is not a field: write it as name:type, e.g. user_id:int")
        if keyword.iskeyword(key):
            raise ConfigError(f"{key}: this is a keyword of Python; use the setting events")
        if key in declared:
            raise ConfigError(f"{key}: this field is given twice")
        declared[key] = text
    kind = EventType(name, declared_class(name, declared))
    used = {word for each in kind.fields for word in re.findall(r"\w+", written(each.hint))}
    lines = [line for each, line in _IMPORTS.items() if each in used]
    if lines:
        lines.append("")
    lines += ["from datapipe import Event, register", "", ""]
    lines += [f'@register("{name}")', f"class {_camel(name)}(Event):"]
    for each in kind.fields:
        hint = written(each.hint) + (" | None" if each.nullable else "")
        lines.append(f"    {each.name}: {hint}{_default(each.default, declared[each.name])}")
    if not kind.fields:
        lines.append("    pass")
    return "\n".join(lines) + "\n"


def _default(value: object, text: str) -> str:
    if "=" not in text:
        return " = None" if text.rstrip().endswith("?") else ""
    if type(value).__module__ == "builtins":
        return f" = {value!r}"
    raise ConfigError(f"{text}: a default of this type has to be written into the class by hand")


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in re.split("_+", name))
