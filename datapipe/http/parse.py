"""A body's bytes -> rows for each lane, and an error for each event that is invalid.

The fast path decodes everything in one go. Only when that fails is the body taken apart, event by
event: so valid bodies pay nothing for the exact errors of invalid ones.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from datapipe.errors import EventRejected, Reason, Refused
from datapipe.events.registry import Registry
from datapipe.events.segment import Chunk
from datapipe.events.types import EventType
from datapipe.events.unknown import Kind
from datapipe.http.claims import Claim

# A keyed POST is cut into parts by event name and at each full 16 KiB of the body: a part must fit,
# whole, into the smallest message of any mirror (64 KB with its envelope), and the cut must depend
# on nothing but the body, so that a retry after a change of code or settings is cut alike.
PART_BYTES = 16_384

_BLANK = b" \t\r\n"
_COMMA = ord(",")
_DEPTH = {_COMMA: 0, ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_BLANK_LINE = re.compile(rb"\n[ \t\r\n]")  # a line that is blank, or may be
_LINE = re.compile(rb"[^ \t\r\n][^\n]*")
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_YIELD_EVERY = 256  # chunks before other requests get a turn
_YIELD_BYTES = 65_536  # of events looked at closely, each counted as _EVENT_BYTES more; some ms
_EVENT_BYTES = 256
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


@dataclass(slots=True)
class Parsed:
    """What a body holds: the valid events in `chunks`, an error for each other, with its index."""

    batch: bool
    chunks: list[Chunk]
    errors: list[tuple[int, Refused]]


class _Run(NamedTuple):
    """Events of one type that become one chunk. Attributes: see `Chunk`."""

    kind: Kind
    indexes: Sequence[int]
    claim: tuple[str, str, int] | None = None
    name: str = ""
    lacks: str = ""


class _Event(msgspec.Struct):
    event_name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_RAW = msgspec.json.Decoder(msgspec.Raw)
_RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_NAME = msgspec.json.Decoder(_Event)
_TEXT = msgspec.json.Decoder(str)

Lanes = frozenset[str] | None  # that an ingest key may post to; None: all
_K = TypeVar("_K")
# decoded events of one type, or their rows -> their rows as one, or None: look closer
_Join = Callable[[Any, list[Any]], bytes | None]


class Parser:
    """Reads bodies.

    Args: max_events: of a batch.
    """

    def __init__(self, registry: Registry, max_events: int) -> None:
        self._registry = registry
        self._one, self._many = registry.one.decode, registry.many.decode
        self._lines = registry.one.decode_lines
        self._max_events = max_events

    async def parse(
        self, body: bytes, received_at: str, claim: Claim | None, lanes: Lanes = None
    ) -> Parsed:
        """Read one body: one JSON object, an array of objects, or NDJSON.

        Args:
            received_at: a time as rows hold it, for all of them.
            claim: hash of the idempotency key, hash of the body; with it the rows come in parts.
            lanes: those that this ingest key may post to.
        Raises: EventRejected: the body as a whole, or its only event, is invalid.
        """
        body = body.lstrip(_BLANK)
        if not body:
            raise EventRejected(Reason.NO_CONTENT, "the body is empty")
        batch = body.startswith(b"[")
        events: list[Any] | None = None
        if batch:
            with suppress(*_BROKEN):
                events = self._many(body)
        elif chunk := self.single(body, received_at, claim, lanes):
            return Parsed(batch, [chunk], [])
        elif _is_lines(body):
            batch, events = True, self._decode_lines(body)
        if events and _is_utf8(body):  # msgspec does not check what no event type declares
            if len(events) > self._max_events:
                raise self._too_many()
            parts = _parts(body) if claim and batch and len(body) > PART_BYTES else None
            simple = b"\\" not in body

            def join(kind: EventType, some: list[Any]) -> bytes | None:
                if lanes is not None and kind.name not in lanes:
                    return None
                try:
                    return kind.rows(some, received_at, plain=simple)
                except EventRejected:  # a value is out of range
                    return None

            runs = [
                _Run(self._registry.by_struct[struct], indexes, claim and (*claim, number))
                for (struct, number), indexes in _grouped(list(map(type, events)), parts)
            ]
            chunks = await self._chunks(runs, events, join)
            if chunks is not None:
                return Parsed(batch, chunks, [])
        return await self._look_closer(body, batch, received_at, claim, lanes)

    def single(
        self, body: bytes, received_at: str, claim: Claim | None, lanes: Lanes = None
    ) -> Chunk | None:
        """The row of a body that is one valid event; None: `parse` must tell what it is."""
        try:
            event = self._one(body)
            kind = self._registry.by_struct[type(event)]
            row = kind.rows((event,), received_at, plain=b"\\" not in body)
        except (*_BROKEN, EventRejected):
            return None
        if row is None or not _is_utf8(body) or (lanes is not None and kind.name not in lanes):
            return None
        return Chunk(kind.name, kind.columns, row, 1, claim and (*claim, 0))

    def _decode_lines(self, body: bytes) -> list[Any] | None:
        """The events of NDJSON, or None where a line, or the number of lines, is unusual.

        msgspec does not insist on a line for each: a blank one could make up for one that holds
        two.
        """
        if _BLANK_LINE.search(body):
            return None
        lines = body.count(b"\n") + (not body.endswith(b"\n"))
        if lines > self._max_events:
            return None  # blank lines among them may be why: count exactly
        try:
            events = self._lines(body)
        except _BROKEN:
            return None
        return events if len(events) == lines else None

    async def _chunks(
        self, runs: Iterable[_Run], items: list[Any], join: _Join
    ) -> list[Chunk] | None:
        """A chunk for each run, or None: look closer.

        Args: items: what `join` takes, one for each event.
        """
        chunks: list[Chunk] = []
        for kind, indexes, claim, name, lacks in runs:
            if len(chunks) % _YIELD_EVERY == _YIELD_EVERY - 1:
                await asyncio.sleep(0)
            if isinstance(indexes, range):
                some = items[indexes.start : indexes.stop]
            else:
                some = [items[i] for i in indexes]
            if (data := join(kind, some)) is None:
                return None
            chunks.append(
                Chunk(kind.name, kind.columns, data, len(indexes), claim, indexes, name, lacks)
            )
        return chunks

    async def _look_closer(
        self, body: bytes, batch: bool, received_at: str, claim: Claim | None, lanes: Lanes
    ) -> Parsed:
        """Take a body apart, event by event."""
        names: list[str | None] = []
        kinds: list[Kind | None] = []
        rows: list[bytes] = []
        sizes: list[int] = []
        errors: list[tuple[int, Refused]] = []
        since_turn = 0
        array = body.startswith(b"[")
        raws = _elements(body) if array else _lines(body) if batch else iter([body])
        for raw in raws:
            if raw is None:
                await asyncio.sleep(0)
                continue
            index = len(sizes)
            if index >= self._max_events:
                raise self._too_many()
            sizes.append(len(raw))
            name, kind, row = None, None, b""
            try:
                name = _name(raw)
                kind, row = self._row(name, raw, received_at, lanes)
            except EventRejected as exc:
                if not batch:
                    raise
                if not errors:
                    exc.body = raw  # one is enough to show
                exc.__context__ = None  # there may be thousands: drop the frames that they hold
                errors.append((index, exc.with_traceback(None)))
            names.append(name)
            kinds.append(kind)
            rows.append(row)
            since_turn += len(raw) + _EVENT_BYTES
            if since_turn >= _YIELD_BYTES:
                since_turn = 0
                await asyncio.sleep(0)
        if not sizes:
            raise EventRejected(Reason.NO_CONTENT, "there is no event in it")
        runs = _runs(names, kinds, sizes, claim)
        chunks = await self._chunks(runs, rows, lambda _, some: b"".join(some))
        return Parsed(batch, chunks or [], errors)

    def _too_many(self) -> EventRejected:
        detail = f"more than {self._max_events} events in one POST, which batch_max_events sets"
        return EventRejected(Reason.TOO_LONG, detail, 413)

    def _row(self, name: str, raw: bytes, received_at: str, lanes: Lanes) -> tuple[Kind, bytes]:
        """The type of one JSON object, and its row. Raises: EventRejected: why it is refused."""
        kind = self._kind(name)
        if lanes is not None and kind.name not in lanes:
            detail = f"this ingest key may not post events of type {kind.name!r}"
            raise EventRejected(Reason.FORBIDDEN, detail)
        try:
            return kind, kind.look_closer(raw, received_at)
        except _BROKEN as exc:
            raise _not_json(_TWO_OBJECTS if _are_two(raw, exc) else exc) from None

    def _kind(self, name: str) -> Kind:
        kind = self._registry.kind_of(name)
        if kind is None:
            shown = name if len(name) <= 64 else f"{name[:64]}..."
            detail = f"event_name: unsupported event type {shown!r}"
            raise EventRejected(Reason.UNSUPPORTED_EVENT, detail)
        return kind


def _name(raw: bytes) -> str:
    """The `event_name` of one JSON object. Raises: EventRejected: it has none, or is none."""
    try:
        if not _is_utf8(raw):
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
    except _BROKEN as exc:
        raise _not_json(_TWO_OBJECTS if _are_two(raw, exc) else exc) from None


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


def _is_utf8(body: bytes) -> bool:
    try:
        return body.isascii() or bool(body.decode())
    except UnicodeDecodeError:
        return False


def _is_lines(body: bytes) -> bool:
    """More than one line that is not blank, and not one value written over several of them."""
    try:
        _RAW.decode(body)
    except _BROKEN:
        return len(list(itertools.islice(_lines(body), 2))) == 2
    return False


def _lines(body: bytes) -> Iterator[bytes]:
    """The lines that are not blank, cut off one by one: a body can have millions."""
    return (found[0].rstrip(_BLANK) for found in _LINE.finditer(body))


def _parts(body: bytes) -> list[int]:
    """The part that each event of a batch falls into."""
    raws = _RAW_LIST.decode(body) if body.startswith(b"[") else _lines(body)
    return _part_numbers([len(memoryview(raw)) for raw in raws])


def _part_numbers(sizes: list[int]) -> list[int]:
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [start // PART_BYTES for start in starts]


def _runs(
    names: Sequence[str | None],
    kinds: Sequence[Kind | None],
    sizes: list[int],
    claim: Claim | None,
) -> Iterator[_Run]:
    """Of a body some events of which are rejected: those have no type; not even a name, if it can't
    be read.
    """
    if claim is None:
        yield from (_Run(kind, indexes) for (kind, _), indexes in _grouped(kinds, None) if kind)
        return
    numbers = _part_numbers(sizes)
    lacks = _lacks(names, kinds, numbers) if None in kinds else {}
    named = [kind and (kind, name or "") for kind, name in zip(kinds, names, strict=True)]
    for (accepted, number), indexes in _grouped(named, numbers):
        if accepted:
            kind, name = accepted
            own = "" if name == kind.name else name
            lacking = lacks.get((name, number), "")
            yield _Run(kind, indexes, (*claim, number), own, lacking)


def _lacks(
    names: Sequence[str | None], kinds: Sequence[Kind | None], numbers: Sequence[int]
) -> dict[tuple[str, int], str]:
    """What parts lack (see `Chunk`), by name and number.

    What has no name that can be read is rejected at each try, so it counts nowhere.
    """
    counts: Counter[tuple[str, int]] = Counter()
    bits: Counter[tuple[str, int]] = Counter()
    for name, kind, number in zip(names, kinds, numbers, strict=True):
        if name is not None:
            if kind is None:
                bits[name, number] |= 1 << counts[name, number]
            counts[name, number] += 1
    return {part: f"{lacking:x}" for part, lacking in bits.items()}


def _grouped(
    keys: Sequence[_K], parts: Sequence[int] | None
) -> Iterable[tuple[tuple[_K, int], Sequence[int]]]:
    """Key and part, and the indexes of their events."""
    if keys.count(keys[0]) == len(keys):  # most bodies
        return _ranges(keys[0], parts or [0] * len(keys))
    groups: dict[tuple[_K, int], list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key, parts[index] if parts else 0].append(index)
    return groups.items()


def _ranges(key: _K, parts: Sequence[int]) -> Iterator[tuple[tuple[_K, int], Sequence[int]]]:
    """The same for one key: each part is a run of events."""
    start = 0
    while start < len(parts):
        end = bisect_right(parts, parts[start], start)
        yield (key, parts[start]), range(start, end)
        start = end


def _elements(body: bytes) -> Iterator[bytes | None]:
    """The elements of a JSON array, one at a time, without making an object of any.

    So 8 MiB of `[1,1,...]` costs no memory. Yields None now and then, to give other requests a
    turn: an element can hold millions of brackets. Raises: EventRejected: the array does not parse.
    """
    try:
        _RAW.decode(body)
    except _BROKEN as exc:
        raise _not_json(exc) from None
    if not _is_utf8(body):
        raise _not_json("it is not UTF-8")
    start = at = depth = 1
    for step in itertools.count(1):
        found = (_TO_COMMA_OR_BRACKET if depth == 1 else _TO_BRACKET).match(body, at)
        if found is None:
            raise AssertionError(f"byte {at} of a body that parsed")
        at = found.end()
        depth += _DEPTH[body[at - 1]]
        if not depth or body[at - 1] == _COMMA:
            if element := body[start : at - 1].strip(_BLANK):
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


def _are_two(line: bytes, error: Exception) -> bool:
    """Whether that is why it does not parse."""
    found = _TRAILING.search(str(error))
    return found is not None and line[int(found[1]) - 1 :].startswith(b"{")


def _not_json(why: object) -> EventRejected:
    return EventRejected(Reason.BAD_JSON, f"not JSON: {why}")
