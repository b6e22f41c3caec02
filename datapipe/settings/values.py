"""Values become a structure, or one line that names the key, the source and what is wanted."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from datapipe.errors import ConfigError

SECRETS = frozenset(
    {"ingest_keys", "admin_key", "database_url", "ironmq_token", "nats_url", "nats_password",
     "mirror_options", "sink_options"}
)  # fmt: skip

FINITE = sys.float_info.max  # an upper bound that excludes infinity

_DURATION = re.compile(r"\s*([0-9]{1,9})\s*(second|minute|hour|day|week)s?\s*")
_UNIT_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


def convert(
    values: Mapping[str, Any],
    kind: type[_Struct],
    source: str | None,
    *,
    within: str = "",
    strict: bool = True,
) -> _Struct:
    """The values as a structure of that kind.

    Args: within: the key that holds them, if any; then no value is shown: it may be a secret.
    Raises: ConfigError: names the key, the source and what is wanted.
    """
    try:
        return msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as exc:
        what, _, path = str(exc).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    types = types_of(kind)
    key = ".".join(filter(None, (within, path)))
    if field := re.fullmatch(r"Object (.+) field `(.+)`", what):
        key = ".".join(filter(None, (key, field[2])))
        if field[1] == "missing required":
            raise wrong(key, "must be given", source)
        import difflib

        near = difflib.get_close_matches(field[2], types, n=1, cutoff=0.0)
        remedy = f"; the nearest is {near[0]!r}" if near else "; there are none"
        origin = f" ({source})" if source else ""
        raise ConfigError(f"{key}: no such setting{origin}{'' if path else remedy}")
    why = re.sub("(Invalid enum value).*", r"\1", what)
    if wanted := _wanted(types.get(path)):
        why = f"must be {wanted}"
        if not within and path not in SECRETS:
            why += f", not {reprlib.repr(values[path])}"
    raise wrong(key, why, source)


def types_of(kind: type[msgspec.Struct]) -> dict[str, inspect.Type]:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return {field.encode_name: field.type for field in described.fields}


_WORDS: dict[type[inspect.Type], str] = {
    inspect.BoolType: "true or false",
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "text",
    inspect.ListType: "a JSON list",
    inspect.DictType: "a JSON object",
}


def _wanted(kind: inspect.Type | None) -> str | None:
    """What a value of this type must be, in words; None: use msgspec's own message."""
    if isinstance(kind, inspect.LiteralType):
        return f"one of {', '.join(map(str, kind.values))}"
    words = _WORDS.get(type(kind)) if kind else None
    least, most = getattr(kind, "ge", None), getattr(kind, "le", None)
    if words and least is not None:
        words += f" of at least {least:.15g}"
    if words and most not in (None, FINITE):
        words += f" and at most {most:.15g}"
    return words


def seconds_of(text: str) -> int:
    """A duration such as `90 days`, in seconds. Raises: ValueError: it is none; says the form."""
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ValueError(
            f"{text!r} is not a duration: write it as in '90 days', '12 hours', '2 weeks'"
        )
    return int(match[1]) * _UNIT_S[match[2]]


def wrong(key: str, why: str, source: str | None) -> ConfigError:
    return ConfigError(f"{key}{f' (from {source})' if source else ''}: {why}")
