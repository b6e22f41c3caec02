"""A body's bytes -> rows for each lane, and an error for each event that is invalid.

The fast path decodes everything in one go. Only when that fails is the body taken apart, event by
event: so valid bodies pay nothing for the exact errors of invalid ones.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from datapipe.errors import EventRejected, Reason, Refused
from datapipe.events.registry import Registry
from datapipe.events.segment import Chunk
from datapipe.events.types import EventType
from datapipe.events.unknown import Kind
from datapipe.http.claims import Claim
from datapipe.http.elements import (
    BLANK,
    BROKEN,
    broken,
    elements,
    event_name,
    is_lines,
    is_utf8,
    lines,
)
from datapipe.http.parts import PART_BYTES, Run, grouped, part_of_each, runs_of

_BLANK_LINE = re.compile(rb"\n[ \t\r\n]")  # a line that is blank, or may be
_YIELD_EVERY = 256  # chunks before other requests get a turn
_YIELD_BYTES = 65_536  # of events looked at closely, each counted as _EVENT_BYTES more; some ms
_EVENT_BYTES = 256


@dataclass(slots=True)
class Parsed:
    """What a body holds: the valid events in `chunks`, an error for each other, with its index."""

    batch: bool
    chunks: list[Chunk]
    errors: list[tuple[int, Refused]]


Lanes = frozenset[str] | None  # that an ingest key may post to; None: all
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
        body = body.lstrip(BLANK)
        if not body:
            raise EventRejected(Reason.NO_CONTENT, "the body is empty")
        batch = body.startswith(b"[")
        events: list[Any] | None = None
        if batch:
            with suppress(*BROKEN):
                events = self._many(body)
        elif chunk := self.single(body, received_at, claim, lanes):
            return Parsed(batch, [chunk], [])
        elif is_lines(body):
            batch, events = True, self._decode_lines(body)
        if events and is_utf8(body):  # msgspec does not check what no event type declares
            if len(events) > self._max_events:
                raise self._too_many()
            parts = part_of_each(body) if claim and batch and len(body) > PART_BYTES else None
            simple = b"\\" not in body

            def join(kind: EventType, some: list[Any]) -> bytes | None:
                if lanes is not None and kind.name not in lanes:
                    return None
                try:
                    return kind.rows(some, received_at, plain=simple)
                except EventRejected:  # a value is out of range
                    return None

            runs = [
                Run(self._registry.by_struct[struct], indexes, claim and (*claim, number))
                for (struct, number), indexes in grouped(list(map(type, events)), parts)
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
        except (*BROKEN, EventRejected):
            return None
        if row is None or not is_utf8(body) or (lanes is not None and kind.name not in lanes):
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
        except BROKEN:
            return None
        return events if len(events) == lines else None

    async def _chunks(
        self, runs: Iterable[Run], items: list[Any], join: _Join
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
        raws = elements(body) if array else lines(body) if batch else iter([body])
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
                name = event_name(raw)
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
        runs = runs_of(names, kinds, sizes, claim)
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
        except BROKEN as exc:
            raise broken(raw, exc) from None

    def _kind(self, name: str) -> Kind:
        kind = self._registry.kind_of(name)
        if kind is None:
            shown = name if len(name) <= 64 else f"{name[:64]}..."
            detail = f"event_name: unsupported event type {shown!r}"
            raise EventRejected(Reason.UNSUPPORTED_EVENT, detail)
        return kind
