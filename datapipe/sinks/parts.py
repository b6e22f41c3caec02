"""Parts of POSTs with an idempotency key: which of their rows are new to the ledger.

A claim row per (ingest key, idempotency key) says which body stands: the one loaded first. A part
row per (claim, event name, part) says that this run of rows is in, and its `body` which events it
lacked because they were rejected. Of a copy that lacks fewer, as the verdict has changed since,
each such event gets a row of its own. Of another body the same is written, under ids that hold
its hash: so its events are dead letters once. All are ledger rows, only ever inserted, claims
before parts before single events, each in key order, or two loads would deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import count
from typing import NamedTuple

from datapipe.events.segment import Part, Segment
from datapipe.sinks.transaction import Entry, Transaction

KEY_REUSED = "idempotency key reused with another body"  # of a dead letter, without an SQLSTATE

_ALL = -1  # of some bits


class Copy(NamedTuple):
    """A part, in one of the segments that hold it."""

    segment: Segment
    part: Part

    def rows(self, bits: int) -> list[bytes]:
        """The rows of these events (see `Chunk.lacks`)."""
        if not bits:
            return []
        data = self.segment.data[self.part.start : self.part.end]
        lacking = _bits(self.part.lacks)
        events = (n for n in count() if not lacking >> n & 1)
        rows = zip(events, data.split(b"\n")[:-1], strict=False)
        return [row + b"\n" for n, row in rows if bits >> n & 1]


class Outcome(NamedTuple):
    """What becomes of a part that is not just loaded: those of its rows that are new.

    Attributes: reused: they are dead letters, for another body stands under their key.
    """

    rows: Sequence[bytes]
    reused: bool


def outcomes_of(
    transaction: Transaction, lane: str, segments: Sequence[Segment]
) -> dict[Copy, Outcome]:
    """Enter claims and parts of new segments; says which parts are not just loaded."""
    copies = [Copy(segment, part) for segment in segments for part in segment.parts]
    if not copies:
        return {}
    bodies: dict[str, str | None] = {}
    for _, part in copies:
        bodies.setdefault(f"claim:{part.claim}", part.body)
    first = transaction.enter("claim", [Entry(id, body=bodies[id]) for id in sorted(bodies)])
    if known := [id for id in sorted(bodies) if id not in first]:
        # a claim that is missing by now was past `dedupe_window`: nothing stands against it
        standing = transaction.bodies(known)
        # a part that outlived its claim would be taken for one of the next body under the key
        transaction.renew([id for id, body in standing.items() if body == bodies[id]])
        bodies |= standing
    by_id: dict[str, list[Copy]] = {}
    reused: set[str] = set()
    for copy in copies:
        part = copy.part
        if bodies[f"claim:{part.claim}"] == part.body:
            id = f"part:{part.claim}:{part.name or lane}:{part.number}"
        else:
            id = f"part:{part.claim}:{part.body}:{part.name or lane}:{part.number}"
            reused.add(id)
        by_id.setdefault(id, []).append(copy)
    entries = [Entry(id, body=by_id[id][0].part.lacks or None) for id in sorted(by_id)]
    new = transaction.enter("part", entries, lane)
    if len(new) == len(copies) and not reused:  # most of the time
        return {}
    filled = _fill(transaction, lane, by_id, new)
    outcomes: dict[Copy, Outcome] = {}
    for id, of_part in by_id.items():
        for copy in of_part:
            whole = id in new and copy is of_part[0]
            if id in reused or not whole:
                rows = copy.rows(_ALL if whole else filled[copy])
                outcomes[copy] = Outcome(rows, id in reused)
    return outcomes


def _fill(
    transaction: Transaction, lane: str, by_id: Mapping[str, Sequence[Copy]], new: Set[str]
) -> Counter[Copy]:
    """Enter what parts lack and a later copy of them has: the bits of these events, by copy."""
    known = [id for id in by_id if id not in new]
    lacking = transaction.bodies(known) if known else {}
    events: dict[str, tuple[Copy, int]] = {}
    for id, copies in by_id.items():
        later = copies[1:] if id in new else copies
        lacks = _bits(copies[0].part.lacks if id in new else lacking.get(id))
        for copy in later if lacks else ():
            had = lacks & ~_bits(copy.part.lacks)
            events |= {f"{id}:{n}": (copy, n) for n in range(had.bit_length()) if had >> n & 1}
    filled: Counter[Copy] = Counter()
    if events:
        for id in transaction.enter("part", [Entry(id) for id in sorted(events)], lane):
            copy, n = events[id]
            filled[copy] |= 1 << n
    return filled


def _bits(lacks: str | None) -> int:
    return int(lacks or "0", 16)


def kept(segment: Segment, outcomes: Mapping[Copy, Outcome]) -> list[bytes | memoryview]:
    """The rows of a segment that go into its table, in runs."""
    if not outcomes:
        return [segment.data]
    copies = [copy for part in segment.parts if (copy := Copy(segment, part)) in outcomes]
    if not copies:
        return [segment.data]
    view, at = memoryview(segment.data), 0
    kept: list[bytes | memoryview] = []
    for copy in copies:
        kept.append(view[at : copy.part.start])
        outcome = outcomes[copy]
        kept += () if outcome.reused else outcome.rows
        at = copy.part.end
    kept.append(view[at:])
    return [piece for piece in kept if len(piece)]
