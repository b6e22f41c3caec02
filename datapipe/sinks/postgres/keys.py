"""Idempotency keys in the load's transaction: which rows of keyed POSTs are new.

A claim row per (ingest key, idempotency key) says which body stands: the one loaded first. A part
row per (claim, lane, part) says that this run of rows is in. Both are ledger rows, written in key
order, claims before parts, or two loads would deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence

import psycopg2.extensions

from datapipe.events.segment import Part, Segment
from datapipe.sinks.postgres.copy import Rows


class Keys:
    """Decides about the parts of the new segments of one load."""

    def __init__(self, cursor: psycopg2.extensions.cursor, ledger: str, process: str) -> None:
        self._cursor = cursor
        self._ledger = ledger
        self._process = process

    def rows(self, lane: str, segments: Sequence[Segment]) -> tuple[list[Rows], dict[str, int]]:
        """The rows to copy, and by segment the number of events that are duplicates."""
        keyed = [(segment, part) for segment in segments for part in segment.parts]
        skipped: set[tuple[str, Part]] = set()
        if keyed:
            standing = self._claim([part for _, part in keyed])
            named: dict[str, tuple[str, Part]] = {}
            for segment, part in keyed:
                name = f"part:{part.claim}:{lane}:{part.number}"
                # a claim that is gone by now was past `dedupe_window`: nothing stands against it
                if standing.get(part.claim, part.body) != part.body or name in named:
                    skipped.add((segment.id, part))
                else:
                    named[name] = (segment.id, part)
            new = self._insert("part", dict.fromkeys(named, lane), "lane")
            skipped |= {named[name] for name in named.keys() - new}
        duplicates = {segment.id: 0 for segment in segments}
        for segment_id, part in skipped:
            duplicates[segment_id] += part.events
        return [
            Rows(segment.id, piece) for segment in segments for piece in _kept(segment, skipped)
        ], duplicates

    def _claim(self, parts: Sequence[Part]) -> dict[str, str]:
        """Write the claims that are not there yet; the body that stands, by claim."""
        first: dict[str, str] = {}
        for part in parts:
            first.setdefault(part.claim, part.body)
        names = {f"claim:{claim}": body for claim, body in first.items()}
        self._insert("claim", names, "body")
        self._cursor.execute(
            f"SELECT segment, body FROM {self._ledger} WHERE segment = ANY(%s)", (list(names),)
        )
        return {name.removeprefix("claim:"): body for name, body in self._cursor.fetchall()}

    def _insert(self, kind: str, values: dict[str, str], column: str) -> set[str]:
        """Ledger rows in key order; the names of those that were not there."""
        names = list(values)
        self._cursor.execute(
            f"INSERT INTO {self._ledger} (segment, kind, {column}, process)"
            " SELECT name, %s, value, %s FROM unnest(%s::text[], %s::text[]) AS new (name, value)"
            " ORDER BY name ON CONFLICT DO NOTHING RETURNING segment",
            (kind, self._process, names, [values[name] for name in names]),
        )
        return {name for (name,) in self._cursor.fetchall()}


def _kept(segment: Segment, skipped: set[tuple[str, Part]]) -> list[bytes | memoryview]:
    """The segment's rows without the skipped parts, in runs."""
    gone = [part for part in segment.parts if (segment.id, part) in skipped]
    if not gone:
        return [segment.data]
    view, kept, at = memoryview(segment.data), [], 0
    for part in gone:
        kept.append(view[at : part.start])
        at = part.end
    kept.append(view[at:])
    return [piece for piece in kept if len(piece)]
