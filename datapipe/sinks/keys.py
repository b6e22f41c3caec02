"""Idempotency keys in the load's transaction: which rows of keyed POSTs are new.

A claim row per (ingest key, idempotency key) says which body stands: the one loaded first. A part
row per (claim, lane, part) says that this run of rows is in. Both are ledger rows, written in key
order, claims before parts, or two loads would deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from datapipe.events.segment import Part, Segment
from datapipe.sinks.transaction import Entry, Rows, Transaction

_Keyed = tuple[str, Part]  # a part, and the id of its segment


def without_known_parts(
    transaction: Transaction, lane: str, segments: Sequence[Segment]
) -> tuple[list[Rows], Counter[str]]:
    """The rows of new segments to copy, and by segment the number of events that are duplicates."""
    keyed = [(segment.id, part) for segment in segments for part in segment.parts]
    skipped = set(keyed) - _enter(transaction, lane, keyed) if keyed else set()
    duplicates: Counter[str] = Counter()
    for id, part in skipped:
        duplicates[id] += part.events
    return [
        Rows(segment.id, piece) for segment in segments for piece in _kept(segment, skipped)
    ], duplicates


def _enter(transaction: Transaction, lane: str, keyed: Sequence[_Keyed]) -> set[_Keyed]:
    """Write claims and parts that are not there yet; the parts that are new, of the right body."""
    bodies: dict[str, str] = {}
    for _, part in keyed:
        bodies.setdefault(f"claim:{part.claim}", part.body)
    transaction.enter("claim", [Entry(id, body=bodies[id]) for id in sorted(bodies)])
    # a claim that is missing by now was past `dedupe_window`: nothing stands against it
    bodies |= transaction.bodies(list(bodies))
    standing: dict[str, _Keyed] = {}
    for id, part in keyed:
        if bodies[f"claim:{part.claim}"] == part.body:
            standing.setdefault(f"part:{part.claim}:{lane}:{part.number}", (id, part))
    if not standing:
        return set()
    entries = [Entry(id) for id in sorted(standing)]
    return {standing[id] for id in transaction.enter("part", entries, lane)}


def _kept(segment: Segment, skipped: Set[_Keyed]) -> list[bytes | memoryview]:
    """The segment's rows without the skipped parts, in runs."""
    parts = [part for part in segment.parts if (segment.id, part) in skipped]
    if not parts:
        return [segment.data]
    view, kept, at = memoryview(segment.data), [], 0
    for part in parts:
        kept.append(view[at : part.start])
        at = part.end
    kept.append(view[at:])
    return [piece for piece in kept if len(piece)]
