"""Mirror: where segments stay until their load has committed. Memory is its cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from datapipe.errors import MirrorUnavailable
from datapipe.events.registry import load_registry
from datapipe.events.segment import Segment
from datapipe.settings import Plugin, Settings, plugin


@dataclass(slots=True, frozen=True)
class Traits:
    """What the pipeline needs to know about a mirror; some of it may change as the mirror learns.

    Attributes:
        batch_bytes: rows that go into one segment, unless a single event is larger.
        appends_at_once: how many appends may be under way for one queue.
        linger_s: seconds to gather rows before an append, unless a segment is full.
        queue_per_lane: each lane has a queue of its own there; otherwise all share one.
        durable: what is stored outlives the process. If not, memory is all there is, and each
            request is judged by the room that is left.
        identity: the store that only this process appends to.
        recover_interval_s: seconds between two recoveries, while nothing asks for one sooner.
        keep_interval_s: seconds between two calls of `keep`.
        group: names the processes that share it, and is the source of its segments: any of them may
            load what any of them stored. Then `waiting` is the count of all of them, whatever is
            taken may be redelivered to another process, and there is a `channel`. Else empty.
        fence_s: seconds after it was taken at which a segment must be in the ledger, or not at all;
            None: it is ours for as long as we live.
    """

    batch_bytes: int
    identity: str
    recover_interval_s: float
    appends_at_once: int = 1
    linger_s: float = 0.0
    queue_per_lane: bool = False
    durable: bool = True
    keep_interval_s: float = 5.0
    group: str = ""
    fence_s: float | None = None

    @property
    def shared(self) -> bool:
        return bool(self.group)


class Appended(NamedTuple):
    """What became of an append.

    Attributes:
        stored: durable, in order: the same segments, or pieces of one that did not fit.
        error: why the rest is not; nothing was promised for it.
    """

    stored: Sequence[Segment] = ()
    error: MirrorUnavailable | None = None


class Waiting(Protocol):
    """What waits of one lane, as totals: they follow what happens, and a look costs nothing.

    Of a shared mirror: what waits for all processes, of which `in_memory` is what this one has
    taken and neither removed nor requeued.

    Attributes:
        in_memory, parked: events whose rows are held in memory, and those that are durable alone.
        bytes: of the rows of both.
    """

    @property
    def in_memory(self) -> int: ...

    @property
    def parked(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    @property
    def events(self) -> int: ...

    @property
    def oldest(self) -> float | None:
        """Unix time at which the oldest segment was sealed, or None; minus infinity: unknown."""


@dataclass(slots=True, frozen=True)
class MirrorState:
    """For the page: `up` is the outcome of the last real call; sizes in bytes.

    `full` says why no more can be stored now; `fullest` is the share in use of the fullest queue,
    where each has a limit of its own. `calls` counts the requests to a remote mirror, by
    kind; `expires_s` is how long it keeps a message that nobody takes. `left` counts what a process
    that is dead had taken, or what waits behind that, and `left_s` says within how many seconds it
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
    fullest: float | None = None


@dataclass(slots=True)
class Recovered:
    """What came into one lane by a recovery, from one source of the mirror."""

    segments: int = 0
    events: int = 0
    bytes: int = 0
    source: str = ""


@dataclass(slots=True)
class Recovery:
    """What a recovery brought.

    Attributes:
        lanes: by name, what is ours from now on.
        unregistered: lanes seen that are not loaded here.
        unconfirmed: processes whose segments were seen and left, because they may live.
        more: there is more to be had, once this is loaded.
        left: there is more that can't be had yet: look again before long.
        due: lanes to be loaded at once, of a shared mirror, whose events are nobody's to recover.
    """

    lanes: dict[str, Recovered] = field(default_factory=dict)
    unregistered: set[str] = field(default_factory=set)
    unconfirmed: set[str] = field(default_factory=set)
    more: bool = False
    left: bool = False
    due: set[str] = field(default_factory=set)


class Answers(NamedTuple):
    """What the others answered.

    Attributes:
        by_process: an answer for each process that gave one.
        silent: processes that live, and were not heard in time.
    """

    by_process: Mapping[str, bytes]
    silent: Set[str] = frozenset()


class Channel(Protocol):
    """Questions between the processes that share a mirror, on whatever machine they run."""

    async def answer(self, how: Callable[[bytes], Awaitable[bytes]]) -> None:
        """From now on, answer the questions of others; an answer may take as long as it needs."""

    async def ask(self, question: bytes, living: Set[str]) -> Answers:
        """Ask all others, and wait for each that is heard of.

        Args: living: ids of the processes that are expected to answer, without our own.
        Raises: MirrorUnavailable: nobody can be asked.
        """


class Mark(Protocol):
    """The id by which a database is paired with a cluster; see `datapipe.sinks.Mark`."""

    @property
    def id(self) -> str: ...

    @property
    def confirmed(self) -> bool: ...


FindMark = Callable[[str], Awaitable[Mark | None]]  # see `Membership.find_mark`


class Membership(Protocol):
    """What a mirror must know about the processes that share it, and about the ledger."""

    def is_dead(self, process: str) -> bool:
        """Whether this process is taken to be dead."""

    def can_load(self, lane: str) -> bool:
        """Whether this process can load that lane now."""

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """Which of these segments the ledger knows. Raises: SinkUnavailable, LaneBlocked."""

    async def expire_source(self, source: str) -> None:
        """Drop the ledger rows that other processes wrote for a store that holds nothing any more.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        """Drop the ledger rows of segments of this source, by lane those loaded before then.

        Args: before: Unix times by the database's clock. Raises: SinkUnavailable, LaneBlocked.
        """

    async def database_time(self) -> float:
        """Unix time by the database's clock. Raises: SinkUnavailable, LaneBlocked."""

    async def find_mark(self, prefix: str) -> Mark | None:
        """What the database has for the cluster of that prefix; changes nothing.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def mark(self, prefix: str) -> Mark:
        """The same; made if it is missing, not confirmed. Raises: SinkUnavailable, LaneBlocked."""

    async def confirm_mark(self, prefix: str, id: str) -> None:
        """From now on the mark with that id is confirmed. Raises: SinkUnavailable, LaneBlocked."""


class Mirror(Protocol):
    """Keeps segments until their load has committed."""

    @property
    def traits(self) -> Traits: ...

    @property
    def channel(self) -> Channel | None:
        """Reaches the other processes; None, unless the mirror is shared."""

    @property
    def pressed(self) -> bool:
        """Whether half of the memory is in use, or would be if nothing had been parked."""

    async def append(self, segments: Sequence[Segment]) -> Appended:
        """Store them; those in `stored` survive, once this returns, the death of the process (and,
        where the mirror is remote, of the machine), and wait to be taken.
        """

    async def take(self, lane: str, max_bytes: int) -> list[Segment]:
        """The next that wait: `max_bytes` of rows, or a single one; ours until removed or requeued.

        From memory, or read back. Raises: MirrorUnavailable: what comes next can't be read now.
        """

    def requeue(self, lane: str, segments: Sequence[Segment], *, put_off: bool) -> None:
        """Their load failed: they wait again, first in their lane.

        Args: put_off: the lane can't be loaded while others can: until a load of it commits it
            holds no memory, and only its share of the mirror.
        """

    def remove(self, segments: Sequence[Segment]) -> asyncio.Future[None]:
        """Their load has committed: from now on they do not wait; forget them, durably.

        Returns: ends when that is done, however long the mirror is away. A repeat is harmless.
        """

    def waiting(self, lane: str) -> Waiting:
        """What waits in a lane, now and later: the same object each time."""

    def full(self, lanes: Iterable[str]) -> Mapping[str, str]:
        """Those of these lanes that have used up their share, and what to say of each.

        Their new events are refused.
        """

    async def recover(self, membership: Membership) -> Recovery:
        """Take over what waits there, belongs to no living process and is not ours yet.

        Called at start and then regularly. Raises: MirrorUnavailable: some may come later.
        """

    async def keep(self, membership: Membership) -> bool:
        """Do what keeps waiting segments from being lost by age; called every few seconds.

        Returns: whether a recovery is due: something of ours may lie there that we don't know.
        Raises: MirrorUnavailable.
        """

    def expirable(self) -> list[str]:
        """Segments that were removed and can't come back, since last asked.

        The ledger may forget them.
        """

    async def settle(self, timeout_s: float) -> None:
        """At a stop: wait for removals, and let others have at once what is not loaded."""

    def state(self) -> MirrorState: ...


class MirrorPlugin(Plugin):
    """What an entry point of `datapipe.mirrors` names; its fields are those of `mirror_options`."""

    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Mirror]:
        """Open the mirror; no remote server is needed for it.

        Args: process: id of this process; a shared mirror keeps apart whose segments are whose.
        Raises: ConfigError: this process can't have it.
        """
        raise NotImplementedError

    async def check(self, settings: Settings) -> list[tuple[str, str]]:
        """Examine the mirror; findings as (ok, warn, fail or away; text). Changes nothing."""
        return [("ok", f"mirror: {settings.mirror_kind}")]

    async def check_paired(
        self, settings: Settings, find_mark: FindMark | None
    ) -> list[tuple[str, str]]:
        """The same, for a mirror that is paired with one database.

        Args: find_mark: asks the database that is set; None: it is not compared.
        """
        return await self.check(settings)


def open_mirror(settings: Settings, process: str) -> AbstractAsyncContextManager[Mirror]:
    """See `MirrorPlugin.open`: the mirror that the settings name."""
    found: MirrorPlugin = plugin(settings, "mirror")
    return found.open(settings, process)


def name_of(kind: str) -> str:
    """What people call a mirror, within a sentence."""
    names = {"journal": "the journal", "ironmq": "IronMQ", "nats": "NATS", "none": "memory"}
    return names.get(kind, kind)


def unregistered(
    mirror: str, waiting: Mapping[str, int], unit: str, settings: Settings
) -> list[tuple[str, str]]:
    """What `check` has to say of lanes in which something waits and that are no event types here.

    Args: waiting: how much, by lane. unit: of what, as of a single one.
    """
    known = load_registry(settings).kinds
    return [
        (
            "warn",
            f"{mirror}: event type {lane} is not registered here; what waits of it is kept until "
            f"it is: {count:,} {unit}{'' if count == 1 else 's'}",
        )
        for lane, count in sorted(waiting.items())
        if count and lane not in known
    ]


async def check_mirror(
    settings: Settings, find_mark: FindMark | None = None
) -> list[tuple[str, str]]:
    """See `MirrorPlugin.check_paired`; and what an earlier mirror, the journal, still holds."""
    found: MirrorPlugin = plugin(settings, "mirror")
    said = list(await found.check_paired(settings, find_mark))
    if settings.mirror_kind == "journal":
        return said
    from datapipe.mirrors.journal.salvage import left_behind  # which imports this module

    return said + await asyncio.to_thread(left_behind, settings)
