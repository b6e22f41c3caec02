"""Mirror: where segments stay until their load has committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from datapipe.events.segment import Segment
from datapipe.settings import Settings


@dataclass(slots=True)
class Run:
    """Segments of one lane that lie one behind the other in one source of the mirror.

    Of parked segments this is all that memory holds: where they lie, and their totals.

    Attributes:
        source: which store of the mirror (a journal file, a queue).
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


@dataclass(slots=True, frozen=True)
class MirrorState:
    """For the page: `up` is the outcome of the last real call; sizes in bytes.

    `full` says why no more can be stored now. `calls` counts the requests to a remote mirror, by
    kind; `expires_s` is how long it keeps a message that nobody takes. `left` counts what a process
    that is gone had taken, or what waits behind that, and `left_s` tells within how many seconds it
    will have been taken over.
    """

    kind: str
    up: bool
    error: str | None
    bytes: int
    max_bytes: int
    full: str | None = None
    calls: Mapping[str, int] = field(default_factory=dict)
    expires_s: float | None = None
    left: int = 0
    left_s: float | None = None


@dataclass(slots=True)
class Found:
    """What a recovery brought.

    Attributes:
        runs: parked where they lie.
        segments: taken into memory.
        strangers: lanes seen that are not loaded here.
        suspects: processes whose messages were seen and left, because they may live.
        more: there is more to be had, once this is loaded.
        left: there is more that can't be had yet: look again before long.
    """

    runs: list[Run] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    strangers: set[str] = field(default_factory=set)
    suspects: set[str] = field(default_factory=set)
    more: bool = False
    left: bool = False


class Neighbours(Protocol):
    """What a mirror that is shared by processes must know of them."""

    def silent(self, process: str) -> bool:
        """Whether this process is taken to be dead."""

    def loads(self, lane: str) -> bool:
        """Whether this process can load that lane now."""

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """Which of these segments the ledger knows. Raises: SinkUnavailable."""


class Mirror(Protocol):
    """Keeps segments until their load has committed.

    Attributes:
        parks: it holds the rows itself, so memory may drop them.
        appends_at_once: how many appends may be under way for one `queue_of`.
        segment_max_bytes: rows that go into one segment, unless a single event is larger.
        gather_s: seconds to gather rows before an append, unless there is a segment full.
        identity: the store that only this process appends to.
        forgets_for_good: what was removed can't come back, so its ledger row may go.
        reads_ahead: what waits can be read while what lies before it is being removed, at no cost.
        recover_interval_s: seconds between two recoveries, while nothing asks for one sooner.
        given_up: a segment may be stored although its append failed, or its removal was refused:
            recover soon.
    """

    parks: bool
    identity: str
    forgets_for_good: bool
    reads_ahead: bool
    recover_interval_s: float
    given_up: bool

    @property
    def appends_at_once(self) -> int: ...

    @property
    def segment_max_bytes(self) -> int: ...

    @property
    def gather_s(self) -> float: ...

    def queue_of(self, lane: str) -> str:
        """The queue that the lane's segments go through; lanes that share one commit together."""

    async def append(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Store them, and set `source` and `position` (rising within a source) of each.

        Once this returns they survive the death of the process (and, where the mirror is remote,
        of the machine). Returns: what was stored: the same, or pieces of what did not fit.
        Raises: MirrorUnavailable: nothing is promised; it names what was stored all the same.
        """

    async def remove(self, segments: Sequence[Segment]) -> None:
        """Forget them, durably. Unknown ones are ignored, so a repeat is harmless.

        Raises: MirrorUnavailable: safe to call again.
        """

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        """The first segments of a run, oldest first: `max_bytes` of memory, or a single one.

        Fewer than asked for, but none only when the run has ended. Raises: MirrorUnavailable.
        """

    def drained(self) -> list[str]:
        """Sources that held segments of dead processes and hold none any more, since last asked."""

    async def forgotten(self, source: str) -> None:
        """The ledger has forgotten a drained source: nothing of it can be met any more."""

    async def recover(self, neighbours: Neighbours) -> Found:
        """What waits here, belongs to no living process and was not told before: now it is ours.

        Called at start and then regularly. Raises: MirrorUnavailable: some may come later.
        """

    async def keep(self, neighbours: Neighbours) -> None:
        """Do what keeps waiting segments from being lost by age; called every few seconds.

        Raises: MirrorUnavailable.
        """

    async def release_all(self) -> None:
        """At a stop: what was recovered and is not loaded can be had by others at once.

        Takes a second or so at the most, and never fails: what stays is theirs after a while.
        """

    def state(self) -> MirrorState: ...


@asynccontextmanager
async def open_mirror(settings: Settings, process: str) -> AsyncIterator[Mirror]:
    """Open the mirror that the settings name; no remote server is needed for it.

    Args: process: id of this process; a shared mirror keeps apart whose segments are whose.
    """
    kind = settings.mirror_kind
    if kind == "journal":
        from datapipe.mirrors.journal.mirror import open_journal

        async with open_journal(settings) as journal:
            yield journal
    elif kind == "ironmq":
        from datapipe.mirrors.ironmq.recovery import open_ironmq

        async with open_ironmq(settings, process) as ironmq:
            yield ironmq
    else:
        from datapipe.mirrors.memory import MemoryMirror

        yield MemoryMirror(settings)


async def check_mirror(settings: Settings) -> list[tuple[str, str]]:
    """Is the mirror well? Findings as (ok, warn, fail or away; text). Changes nothing."""
    kind = settings.mirror_kind
    if kind == "journal":
        from datapipe.mirrors.journal.salvage import check_journals

        return await asyncio.to_thread(check_journals, settings)
    if kind == "ironmq":
        from datapipe.mirrors.ironmq.recovery import open_ironmq

        async with open_ironmq(settings, "check") as ironmq:
            return await ironmq.check()
    return [("warn", "mirror: none: events live in memory alone until they are loaded")]
