"""What the values of events may be: the types of fields, also within lists and dicts; times.

An annotation is decoded as `wire_type` says. msgspec reads times by RFC 3339 alone; `TIMES` is for
decoders that read those of ISO 8601 as well which people write by hand. They are slower, so bodies
are read without, and what does not fit is looked at again, with them.
"""

from __future__ import annotations

import ast
import re
import types
import typing
from abc import ABC
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, TypedDict
from uuid import UUID

import msgspec

INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
TIME_FORMS = (
    "ISO 8601, such as 2026-11-22T12:00:00.5Z, 2026-11-22 14:00+02:00 or 2026-11-22; UTC unless it "
    "says otherwise"
)
_KEY_SHOWN = 64  # characters


class Time(ABC):  # noqa: B024 - isinstance() is all that is asked of it
    """In the place of `datetime`, for decoders with `TIMES`; what they give is a `datetime`."""


Time.register(datetime)

_WIRE: dict[Any, Any] = {
    int: INT64, datetime: Time, Any: Any, object: Any, type(None): None,
    **{kind: kind for kind in (float, str, bool, date, Decimal, UUID, dict, list)},
}  # fmt: skip
_PARAMETERS = {list: 1, dict: 2}
_BY_NAME = {kind.__name__: kind for kind in _WIRE if kind is not type(None)}
# date; hours and minutes; seconds; offset
_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:([Tt ]\d\d:\d\d)(:\d\d(?:\.\d+)?)?([Zz]|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)


class Hook(TypedDict):
    dec_hook: typing.Callable[[type, Any], Any]


def _time(kind: type, value: Any) -> datetime:
    """A time from text; a date alone is its midnight. Raises: ValueError: it is none."""
    if isinstance(value, datetime):  # a default
        return value
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(TIME_FORMS)
    day, hours, seconds, offset = match.groups()
    whole = f"{day}{hours or 'T00:00'}{seconds or ':00'}{offset or ''}"
    if offset and len(offset) == len("+00"):
        whole += ":00"
    try:
        return msgspec.convert(whole, datetime)
    except msgspec.ValidationError:  # the 31st of February
        raise ValueError("there is no such time") from None


TIMES: Hook = {"dec_hook": _time}


def wire_type(hint: Any) -> Any:
    """The type to decode for an annotation. Raises: TypeError: says what can't be checked."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        union: Any = typing.Union[tuple(wire_type(arg) for arg in args)]  # noqa: UP007 - at run time
        try:
            msgspec.json.Decoder(union, **TIMES)
        except TypeError:
            raise TypeError(
                f"{written(hint)}: in a union datetime goes with None alone, and there is only one "
                "of str, date, Decimal and UUID, only one list, and only one dict"
            ) from None
        return union
    if origin in (list, dict) and args and len(args) != _PARAMETERS[origin]:
        raise TypeError("write it as in list[str], dict[str, int]")
    if origin is list and args:
        return list[wire_type(args[0])]  # type: ignore[misc]
    if origin is dict and args:
        if args[0] is not str:
            raise TypeError("the keys of a dict are str: JSON has no others")
        return dict[str, wire_type(args[1])]  # type: ignore[misc]
    try:
        return _WIRE[origin or hint]
    except (KeyError, TypeError):
        allowed = ", ".join(written(kind) for kind in _WIRE)
        raise TypeError(f"{written(hint)} is not one of {allowed}") from None


def written(hint: Any) -> str:
    """An annotation as it is written in a class: `list[str | None]`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(written, args))
    if origin in (list, dict) and args:
        return f"{origin.__name__}[{', '.join(map(written, args))}]"
    if hint is type(None):
        return "None"
    kind = origin or hint
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def parse_type(text: str) -> Any:
    """The annotation that `written` wrote, such as `list[str | None]`.

    Raises: ValueError: it is none of those that `wire_type` knows.
    """
    try:
        return _annotation(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as exc:
        raise ValueError(f"{text!r} is not a type") from exc


def _annotation(node: ast.expr) -> Any:
    """Raises: KeyError, TypeError."""
    match node:
        case ast.Name(id=name):
            return _BY_NAME[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _annotation(left) | _annotation(right)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_annotation(item)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, item])):
            return dict[_annotation(key), _annotation(item)]  # type: ignore[misc]
    raise TypeError(ast.dump(node))


def wrong_inside(sent: bytes, hint: Any) -> tuple[str, Any]:
    """Where in a value the first is that does not fit, such as `[3]["price"]`, and its annotation.

    Args: sent: the value as JSON, which parses and does not fit `hint`.
    """
    for option in _options(hint):
        args = typing.get_args(option)
        if not args or _container(sent) is not typing.get_origin(option):
            continue
        decoder = msgspec.json.Decoder(wire_type(args[-1]), **TIMES)
        for key, raw in _items(sent):
            try:
                decoder.decode(raw)
            except msgspec.ValidationError:
                place, wanted = wrong_inside(bytes(raw), args[-1])
                return f"[{_shown(key)}]{place}", wanted
    return "", hint


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _container(sent: bytes) -> type | None:
    return {b"[": list, b"{": dict}.get(sent[:1])


def _items(sent: bytes) -> Iterator[tuple[int | str, msgspec.Raw]]:
    if _container(sent) is list:
        yield from enumerate(msgspec.json.decode(sent, type=list[msgspec.Raw]))
    else:
        yield from msgspec.json.decode(sent, type=dict[str, msgspec.Raw]).items()


def _shown(key: int | str) -> str:
    text = str(key) if isinstance(key, int) else msgspec.json.encode(key).decode()
    return text if len(text) <= _KEY_SHOWN else f"{text[:_KEY_SHOWN]}..."
