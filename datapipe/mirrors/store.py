"""Where a `BufferedMirror` keeps its segments: the interface, and what both tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from datapipe.events.segment import Segment
from datapipe.mirrors import Appended, Membership, MirrorState, Recovery, Traits


@dataclass(slots=True)
class Run:
    """Segments of one lane that lie one behind the other in one source of the store.

    Of parked segments this is all that memory holds: where they lie, and their totals.

    Attributes:
        source: which part of the store (a journal file, a queue).
        after, until: positions: all that lie behind `after`, up to and with `until`.
        bytes: of their rows.
        oldest: Unix time at which the first of them was sealed, or earlier.
    """

    lane: str
    source: str
    after: int
    until: int
    segments: int
    events: int
    bytes: int
    oldest: float

    @classmethod
    def of(cls, segment: Segment) -> Run:
        """A single segment as a run."""
        return cls(
            segment.lane, segment.source, segment.position - 1, segment.position, 1,
            segment.events, len(segment.data), segment.created_at,
        )  # fmt: skip


class Removal(NamedTuple):
    """A segment that is loaded, as far as a store must know it to forget it: without its rows.

    Attributes:
        bytes: of its rows.
        missing: see `Segment.missing`.
    """

    id: str
    lane: str
    source: str
    position: int
    bytes: int
    missing: bool = False

    @classmethod
    def of(cls, segment: Segment) -> Removal:
        return cls(
            segment.id, segment.lane, segment.source, segment.position, len(segment.data),
            segment.missing,
        )  # fmt: skip


@dataclass(slots=True)
class Found(Recovery):
    """What a store's recovery brought: runs, parked where they lie, and segments in memory.

    Which lanes they are of is counted by the mirror.
    """

    runs: list[Run] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)


class Store(Protocol):
    """Where a `BufferedMirror` keeps segments. One that is durable holds the rows itself, so memory
    may drop them.

    Attributes:
        reads_ahead: what waits can be read while what lies before it is being removed, at no cost.
        forgets_for_good: what was removed can't come back, so its ledger row may go.
    """

    reads_ahead: bool
    forgets_for_good: bool

    @property
    def traits(self) -> Traits: ...

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """See `Mirror.append`; sets `source` and `position` (rising within a source) of each."""

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """The first segments of a run, oldest first: `max_bytes` of memory, or a single one.

        Fewer than asked for, but none only when the run has ended. Raises: MirrorUnavailable.
        """

    async def remove(self, removals: Sequence[Removal]) -> None:
        """Forget them, durably. Unknown ones are ignored. Raises: MirrorUnavailable: repeat all."""

    async def recover(self, membership: Membership) -> Found:
        """See `Mirror.recover`; what was found before is not found again."""

    async def keep(self, membership: Membership) -> bool:
        """See `Mirror.keep`."""

    async def release(self) -> None:
        """At a stop: what was recovered and is not loaded can be had by others at once.

        Takes a second or so at the most, and never fails: what stays is theirs after a while.
        """

    def state(self) -> MirrorState: ...
