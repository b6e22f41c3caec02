"""A body's bytes -> COPY rows for each lane, and an error for each event that is no good.

The straight way decodes everything in one go. Only when that fails is the body taken apart, event
by event: so good bodies pay nothing for the exact errors of bad ones.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from datapipe.errors import EventRejected
from datapipe.events.registry import Registry
from datapipe.events.segment import Chunk
from datapipe.events.types import EventType

# A keyed POST is cut into parts at each full 16 KiB of the body: a part must fit, whole, into the
# smallest message of any mirror (64 KB with its envelope), and the cut must depend on nothing but
# the body, so that a retry after a change of code or settings is cut alike.
PART_BYTES = 16_384

_BLANK = b" \t\r\n"
_CLOSING = ord("]")
_BLANK_LINES = (b"\n\n", b"\n\r", b"\n ", b"\n\t")  # lines that are blank, or may be
_LINE = re.compile(rb"[^ \t\r\n][^\n]*")
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_YIELD_EVERY = 256  # events looked at closely, or chunks, before other requests get a turn

# JSON that is known to parse, taken apart at C speed and in constant memory: possessive quantifiers
# (`++`, `*+`) remember no place to go back to.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SCALAR = re.compile(_STRING + rb"|[^ \t\r\n,\]]++", re.DOTALL)
_TO_BRACKET = re.compile(
    rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+[\[\]{}]', re.DOTALL
)  # up to and with the next one that is not in a string
_COMMA = re.compile(rb"[ \t\r\n]*+,?[ \t\r\n]*+")
_BRACKETS_AT_ONCE = 4096  # some 2 ms


@dataclass(slots=True)
class Parsed:
    """What a body holds; `total` events, of which those in `chunks` are good and `errors` not."""

    batch: bool
    total: int
    chunks: list[Chunk]
    errors: list[tuple[int, EventRejected]] = field(default_factory=list)


class _Event(msgspec.Struct):
    event_name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_RAW = msgspec.json.Decoder(msgspec.Raw)
_RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_NAME = msgspec.json.Decoder(_Event)
_TEXT = msgspec.json.Decoder(str)


async def parse(
    body: bytes, registry: Registry, max_events: int, received_at: str, keyed: bool
) -> Parsed:
    """Read one body: one JSON object, an array of objects, or NDJSON.

    Args:
        received_at: a time as rows hold it, for all of them.
        keyed: whether the rows are wanted in parts.
    Raises: EventRejected: the body as a whole is no good.
    """
    first = body[:1]
    if not first or first in _BLANK:
        body = body.lstrip(_BLANK)
        first = body[:1]
    if not first:
        raise EventRejected(2, "no_content", "the body is empty")
    single = first != b"["
    valid_text = body.isascii() or _is_utf8(body)
    try:
        events = [registry.one.decode(body)] if single else registry.many.decode(body)
    except _BROKEN:
        single = single and not _is_lines(body)
        events = None
        if first == b"{" and not single:
            events = _decode_lines(body, registry, max_events)
    if events is None or not valid_text:
        return await _look_closer(body, first, single, registry, max_events, received_at, keyed)
    if not events:
        raise EventRejected(2, "no_content", "the batch is empty")
    if len(events) > max_events:
        raise _too_many(max_events)
    chunks = await _chunks(body, first, events, registry, received_at, keyed)
    if chunks is None:
        return await _look_closer(body, first, single, registry, max_events, received_at, keyed)
    return Parsed(not single, len(events), chunks)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_lines(body: bytes) -> bool:
    """More than one line that is not blank, and not one value written over several of them."""
    try:
        _RAW.decode(body)
    except _BROKEN:
        lines = _lines(body)
        return next(lines, None) is not None and next(lines, None) is not None
    return False


def _too_many(max_events: int) -> EventRejected:
    return EventRejected(6, "too_long", f"more than {max_events} events in a batch", 413)


def _decode_lines(body: bytes, registry: Registry, max_events: int) -> list[Any] | None:
    """The events of NDJSON, or None where a line (or a count of them) is odd.

    msgspec does not insist on a line for each: a blank one could make up for one that holds two.
    """
    if any(blank in body for blank in _BLANK_LINES):
        return None
    lines = body.count(b"\n") + (not body.endswith(b"\n"))
    if lines > max_events:
        return None  # blank lines among them may be why: count exactly
    try:
        events = registry.one.decode_lines(body)
    except _BROKEN:
        return None
    return events if len(events) == lines else None


async def _chunks(
    body: bytes, first: bytes, events: list[Any], registry: Registry, at: str, keyed: bool
) -> list[Chunk] | None:
    """The rows of a body in which every event decoded, or None: look closer."""
    simple = b"\\" not in body
    if len(events) == 1 or (
        len({type(event) for event in events}) == 1 and not (keyed and len(body) > PART_BYTES)
    ):
        kind = registry.by_struct[type(events[0])]
        chunk = _chunk(kind, 0, events, range(len(events)), at, simple)
        return None if chunk is None else [chunk]
    parts = _parts(body, first, len(events)) if keyed else [0] * len(events)
    groups: dict[tuple[type, int], list[int]] = {}
    for i, event in enumerate(events):
        groups.setdefault((type(event), parts[i]), []).append(i)
    chunks: list[Chunk] = []
    for (struct, part), indexes in groups.items():
        if len(chunks) % _YIELD_EVERY == _YIELD_EVERY - 1:
            await asyncio.sleep(0)
        of_one = [events[i] for i in indexes]
        chunk = _chunk(registry.by_struct[struct], part, of_one, indexes, at, simple)
        if chunk is None:
            return None
        chunks.append(chunk)
    return chunks


def _chunk(
    kind: EventType, part: int, events: list[Any], indexes: Sequence[int], at: str, simple: bool
) -> Chunk | None:
    try:
        data = kind.rows(events, at, plain=simple)
    except EventRejected:
        return None
    if data is None:
        return None
    return Chunk(kind.name, kind.columns, data, len(events), None, part, indexes)


def _parts(body: bytes, first: bytes, events: int) -> list[int]:
    """The part that each event falls into."""
    if len(body) <= PART_BYTES or events == 1:
        return [0] * events
    raws = _RAW_LIST.decode(body) if first == b"[" else _lines(body)
    return _part_numbers([len(memoryview(raw)) for raw in raws])


def _part_numbers(sizes: list[int]) -> list[int]:
    return [
        (end - size) // PART_BYTES
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)
    ]


def _lines(body: bytes) -> Iterator[bytes]:
    """The lines that are not blank, cut off one by one: a body can have millions."""
    return (found[0].rstrip(_BLANK) for found in _LINE.finditer(body))


async def _look_closer(
    body: bytes,
    first: bytes,
    single: bool,
    registry: Registry,
    max_events: int,
    received_at: str,
    keyed: bool,
) -> Parsed:
    """Take a body apart, event by event."""
    if single:
        kind, data = _one(body, registry, received_at)
        return Parsed(False, 1, [Chunk(kind.name, kind.columns, data, 1)])
    elements: Iterator[bytes | None] = _elements(body) if first == b"[" else _lines(body)
    sizes: list[int] = []
    good: list[tuple[EventType, int, bytes]] = []
    errors: list[tuple[int, EventRejected]] = []
    for raw in elements:
        if raw is None:
            await asyncio.sleep(0)
            continue
        index = len(sizes)
        if index >= max_events:
            raise _too_many(max_events)
        sizes.append(len(raw))
        try:
            kind, data = _one(raw, registry, received_at)
            good.append((kind, index, data))
        except EventRejected as exc:
            if not errors:
                exc.body = raw  # one is enough to show
            exc.__context__ = None  # there may be thousands: without the frames that they hold
            errors.append((index, exc.with_traceback(None)))
        if index % _YIELD_EVERY == _YIELD_EVERY - 1:
            await asyncio.sleep(0)
    if not sizes:
        raise EventRejected(2, "no_content", "the batch is empty")
    parts = _part_numbers(sizes) if keyed else [0] * len(sizes)
    groups: dict[tuple[EventType, int], tuple[list[int], list[bytes]]] = {}
    for kind, index, data in good:
        indexes, rows_of = groups.setdefault((kind, parts[index]), ([], []))
        indexes.append(index)
        rows_of.append(data)
    chunks = [
        Chunk(kind.name, kind.columns, b"".join(rows_of), len(indexes), None, part, indexes)
        for (kind, part), (indexes, rows_of) in groups.items()
    ]
    return Parsed(True, len(sizes), chunks, errors)


def _elements(body: bytes) -> Iterator[bytes | None]:
    """The elements of a JSON array, one at a time, without making an object of any.

    So 8 MiB of `[1,1,...]` costs no memory. None now and then, for others to get a turn: an element
    can hold millions of brackets. Raises: EventRejected: the array does not parse.
    """
    try:
        _RAW.decode(body)
    except _BROKEN as exc:
        raise _not_json(exc) from None
    if not _is_utf8(body):
        raise _not_json("it is not UTF-8")
    at = _past(_COMMA, body, 1)
    while body[at] != _CLOSING:
        start, depth = at, 0
        if body[at] not in b"[{":
            at = _past(_SCALAR, body, at)
        else:
            for brackets in itertools.count(1):
                at = _past(_TO_BRACKET, body, at)
                depth += 1 if body[at - 1] in b"[{" else -1
                if not depth:
                    break
                if brackets % _BRACKETS_AT_ONCE == 0:
                    yield None
        yield body[start:at]
        at = _past(_COMMA, body, at)


def _past(pattern: re.Pattern[bytes], body: bytes, at: int) -> int:
    """Where in JSON that parses the pattern that comes next ends."""
    found = pattern.match(body, at)
    if found is None:
        raise AssertionError(f"byte {at} of a body that parsed")
    return found.end()


def _one(raw: bytes, registry: Registry, received_at: str) -> tuple[EventType, bytes]:
    """The row of one JSON object, and its type. Raises: EventRejected: why it is refused."""
    try:
        if not _is_utf8(raw):
            raise _not_json("it is not UTF-8")
        kind = _kind(raw, registry)
        return kind, kind.look_closer(raw, received_at)
    except _BROKEN as exc:
        raise _not_json(exc) from None


def _kind(raw: bytes, registry: Registry) -> EventType:
    try:
        name = _NAME.decode(raw).event_name
    except msgspec.ValidationError as exc:
        raise EventRejected(3, "bad_json", f"an event is a JSON object: {exc}") from None
    if name is msgspec.UNSET:
        raise EventRejected(4, "key_missing", "event_name: this key is missing")
    try:
        event_name = _TEXT.decode(name)
    except msgspec.ValidationError as exc:
        raise EventRejected(5, "bad_value", f"event_name: str wanted ({exc})") from None
    if event_name not in registry.types:
        shown = event_name if len(event_name) <= 64 else f"{event_name[:64]}..."
        detail = f"event_name: unsupported event type {shown!r}"
        raise EventRejected(7, "unsupported_event", detail)
    return registry.types[event_name]


def _not_json(why: object) -> EventRejected:
    return EventRejected(3, "bad_json", f"not JSON: {why}")
