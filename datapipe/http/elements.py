"""What a body consists of, cut out of it without making objects: elements, lines, names."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec

from datapipe.errors import EventRejected, Reason

BLANK = b" \t\r\n"
_COMMA = ord(",")
_DEPTH = {_COMMA: 0, ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LINE = re.compile(rb"[^ \t\r\n][^\n]*")
BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")  # as msgspec says it
_GZIP = b"\x1f\x8b"  # Source: RFC 1952, section 2.3.1

# JSON that is known to parse, taken apart at C speed and in constant memory: possessive quantifiers
# (`++`, `*+`) never backtrack.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STEPS_AT_ONCE = 4096  # some 2 ms


def _up_to(these: bytes) -> re.Pattern[bytes]:
    """Up to and including the next of these that is not in a string."""
    pattern = rb'[^"%b]*+(?:%b[^"%b]*+)*+[%b]' % (these, _STRING, these, these)
    return re.compile(pattern, re.DOTALL)


_TO_BRACKET = _up_to(rb"\[\]{}")
_TO_COMMA_OR_BRACKET = _up_to(rb",\[\]{}")


class _Event(msgspec.Struct):
    event_name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_RAW = msgspec.json.Decoder(msgspec.Raw)
RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_NAME = msgspec.json.Decoder(_Event)
_TEXT = msgspec.json.Decoder(str)


def event_name(raw: bytes) -> str:
    """The `event_name` of one JSON object. Raises: EventRejected: it has none, or is none."""
    try:
        if not is_utf8(raw):
            packed = raw.startswith(_GZIP)
            raise _not_json(_PACKED if packed else "it is not UTF-8")
        try:
            name = _decode_name(raw)
        except msgspec.ValidationError as exc:
            raise EventRejected(Reason.BAD_JSON, f"an event is a JSON object: {exc}") from None
        if name is msgspec.UNSET:
            raise EventRejected(Reason.KEY_MISSING, "event_name: this field is missing")
        try:
            return _TEXT.decode(name)
        except msgspec.ValidationError as exc:
            raise EventRejected(Reason.BAD_VALUE, f"event_name: must be str: {exc}") from None
    except BROKEN as exc:
        raise broken(raw, exc) from None


def _decode_name(raw: bytes) -> msgspec.Raw | msgspec.UnsetType:
    """The JSON of the `event_name`, also where some text has half of a surrogate pair.

    Such text is JSON, of which msgspec reads nothing. What becomes of it is for the type to say.
    """
    try:
        return _NAME.decode(raw).event_name
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if b"\\u" not in raw:
            raise
        with suppress(ValueError, RecursionError):
            event = _LENIENT.decode(raw.decode())
            if isinstance(event, dict) and isinstance(event.get("event_name"), str):
                return msgspec.Raw(json.dumps(event["event_name"]).encode())
        raise


def _no_json(constant: str) -> Any:
    raise ValueError(constant)


# takes halves of surrogate pairs; but for what else Python's own takes (NaN) it is as strict
_LENIENT = json.JSONDecoder(parse_constant=_no_json)


def is_utf8(body: bytes) -> bool:
    try:
        return body.isascii() or bool(body.decode())
    except UnicodeDecodeError:
        return False


def is_lines(body: bytes) -> bool:
    """More than one line that is not blank, and not one value written over several of them."""
    try:
        _RAW.decode(body)
    except BROKEN:
        return len(list(itertools.islice(lines(body), 2))) == 2
    return False


def lines(body: bytes) -> Iterator[bytes]:
    """The lines that are not blank, cut off one by one: a body can have millions."""
    return (found[0].rstrip(BLANK) for found in _LINE.finditer(body))


def elements(body: bytes) -> Iterator[bytes | None]:
    """The elements of a JSON array, one at a time, without making an object of any.

    So 8 MiB of `[1,1,...]` costs no memory. Yields None now and then, to give other requests a
    turn: an element can hold millions of brackets. Raises: EventRejected: the array does not parse.
    """
    try:
        _RAW.decode(body)
    except BROKEN as exc:
        raise _not_json(exc) from None
    if not is_utf8(body):
        raise _not_json("it is not UTF-8")
    start = at = depth = 1
    for step in itertools.count(1):
        found = (_TO_COMMA_OR_BRACKET if depth == 1 else _TO_BRACKET).match(body, at)
        if found is None:
            raise AssertionError(f"byte {at} of a body that parsed")
        at = found.end()
        depth += _DEPTH[body[at - 1]]
        if not depth or body[at - 1] == _COMMA:
            if element := body[start : at - 1].strip(BLANK):
                yield element
            start = at
        if not depth:
            return
        if step % _STEPS_AT_ONCE == 0:
            yield None


_PACKED = "it is packed by gzip; send it with the header Content-Encoding: gzip"
_TWO_OBJECTS = (
    "a second object follows the first on its line; NDJSON has a line for each (curl -d takes the "
    "ends of lines out of a file, --data-binary keeps them)"
)


def broken(raw: bytes, error: Exception) -> EventRejected:
    """Of one JSON object that does not parse."""
    return _not_json(_TWO_OBJECTS if _are_two(raw, error) else error)


def _are_two(line: bytes, error: Exception) -> bool:
    """Whether that is why it does not parse."""
    found = _TRAILING.search(str(error))
    return found is not None and line[int(found[1]) - 1 :].startswith(b"{")


def _not_json(why: object) -> EventRejected:
    return EventRejected(Reason.BAD_JSON, f"not JSON: {why}")
