"""Where segments are loaded into, exactly once: five narrow interfaces to one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from msgspec import structs

from datapipe.events.limits import Limits
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.events.unknown import Kind
from datapipe.health import Wait
from datapipe.settings import Plugin, Settings, plugin
from datapipe.sinks import urls


@dataclass(slots=True, frozen=True)
class Table:
    """The table of a lane, as its event type wants it; see `EventType`."""

    name: str
    columns: tuple[Column, ...]
    partition: str | None = None
    retention_s: int | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is one of datapipe's, and not of an event type."""
        return self.name.startswith("datapipe_")


@dataclass(slots=True)
class Loaded:
    """What became of the events of one load: their sum is what the segments held.

    `refused` names the first few SQLSTATEs and messages of dead letters, for the log. `dead_of` has
    the number of dead letters of each segment that has any, also of one that was in already.
    """

    loaded: int = 0
    duplicate: int = 0
    dead: int = 0
    refused: tuple[str, ...] = ()
    dead_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class SinkState:
    """For the page; `up` is None until the first real work was tried.

    `answer_s` is what the last small piece of work took, such as the heartbeat; `product` is what
    people call the database, such as MariaDB. `refuses`: it is down, and answers: `error` is what
    it says.
    """

    up: bool | None
    error: str | None
    version: str | None
    schema: str
    answer_s: float | None = None
    product: str = "the database"
    refuses: bool = False

    @property
    def trouble(self) -> str:
        """What is wrong with a database that is down, in a few words."""
        return "refuses us" if self.refuses else "does not answer"


@dataclass(slots=True, frozen=True)
class Heartbeat:
    """What a process shows the others.

    Attributes:
        mirror: the store that only this process appends to: a journal's id, or the process's own.
        oldest_s: age of its oldest event that is not loaded yet, in seconds; of a shared mirror, of
            the oldest of all. Infinite: unknown.
        ended: it stops now, and sends no more heartbeats.
        host: its machine and number there, for people.
        group: of processes that share a mirror, whose segments' source this is; empty: none. Once
            one of them is dead, what waits there is shown by the others.
    """

    process: str
    mirror: str
    oldest_s: float | None
    ended: bool = False
    host: str = ""
    group: str = ""


@dataclass(slots=True, frozen=True)
class Beat:
    """What the database says about a process: a count that rises while it lives."""

    count: int
    ended: bool
    host: str = ""
    group: str = ""


class Mark(NamedTuple):
    """By which a database is paired with a cluster. Attributes: confirmed: the cluster has it."""

    id: str
    confirmed: bool = False


UNKNOWN_GROUPS = 1000  # names of unknown events that are told apart

# the row of an event: lane, its JSON, received_at; raises EventRejected
Check = Callable[[str, bytes, str], bytes]


class Shelf(Enum):
    """The table of events that were accepted and are in no table of their own type."""

    DEAD_LETTERS = "datapipe_dead_letters"
    UNKNOWN = "datapipe_unknown"


@dataclass(slots=True, frozen=True)
class Selection:
    """Selects events of a shelf: those that match every field that is not None.

    Attributes:
        lane: that they are to be replayed into; of unknown events, their `event_name`.
        lanes: the same, any of these.
        sqlstate: of dead letters alone; empty: those without one.
    """

    ids: tuple[int, ...] | None = None
    lane: str | None = None
    sqlstate: str | None = None
    lanes: tuple[str, ...] | None = None
    shelf: Shelf = Shelf.DEAD_LETTERS


class Sink(Protocol):
    """Loads segments into the tables of their lanes, each of them once."""

    async def prepare(self, table: Table) -> list[str]:
        """Once this returns, the table is there with all its columns; made if it was not.

        Returns: the DDL that has been run; of our own tables, too.
        Raises: SinkUnavailable: again later; LaneBlocked: a person must act.
        """

    async def load(
        self,
        table: Table,
        segments: Sequence[Segment],
        *,
        accept_dead: bool = False,
        not_after: float | None = None,
    ) -> Loaded:
        """Write all rows of the segments that the ledger does not know, in one transaction.

        Once this returns, all of them are committed, and so is that the ledger knows them. Safe to
        repeat, whatever it raised. Refused rows are dead letters, counted and not raised, unless
        they are so many that the table is taken to be wrong; `accept_dead` lets those through, too.

        Args: not_after: Unix time by the database's clock. What is to be entered into the ledger
            later than that is not: others may have loaded it since, and the ledger forgotten it.
        Raises: SinkUnavailable: again later, nothing or all is committed; LaneBlocked: nothing is,
        and a person must act.
        """

    async def waits(self) -> dict[str, Wait]:
        """What the database says that loads under way wait for, by lane; not those that work.

        Raises: SinkUnavailable.
        """

    def abort(self) -> None:
        """End loads that are under way, at once; what they did is rolled back or unknown."""

    def state(self) -> SinkState:
        """Its health, by the outcome of the last real work; does no I/O."""

    async def hint(self, table: str) -> str:
        """A line for the shell that shows that table's rows. Raises: SinkUnavailable."""

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """Reach the database; findings as (ok, warn, fail or away; text). Changes nothing."""

    def ddl(self, tables: Sequence[Table]) -> str:
        """What makes these tables and our own in an empty database, for a person to read or run."""


class Ledger(Protocol):
    """Remembers which segments were loaded, and under which idempotency keys."""

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """Which of these segments are committed. Raises: SinkUnavailable, LaneBlocked."""

    async def outcomes(self, segments: Sequence[str]) -> dict[str, int]:
        """How many dead letters each of these segments has that is committed, by whomever.

        As durable as a load of ours is. Raises: SinkUnavailable, LaneBlocked.
        """

    async def expire(self, removed: Sequence[str]) -> None:
        """Once this returns, the ledger has forgotten these segments, which can't come back.

        Keys go as well once `dedupe_window` is over, but none while a segment that was accepted
        within it waits anywhere, by the heartbeats: so a process sends its own before. So do
        segments of mirrors where a copy can come back, once none can any more.

        Raises: SinkUnavailable, LaneBlocked: to be repeated with the same segments.
        """

    async def expire_source(self, source: str, process: str) -> None:
        """Once this returns, what others than this process left of a drained journal is forgotten.

        That is ledger rows and heartbeats. Raises: SinkUnavailable, LaneBlocked.
        """

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        """Once this returns, segments that a shared mirror held under that source are forgotten: of
        each lane named those that were loaded before then.

        Args: before: Unix times by the database's clock. Raises: SinkUnavailable, LaneBlocked.
        """

    async def now(self) -> float:
        """Unix time by the database's clock. Raises: SinkUnavailable, LaneBlocked."""

    async def find_mark(self, prefix: str) -> Mark | None:
        """What this database has for the cluster of that prefix; changes nothing.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def mark(self, prefix: str) -> Mark:
        """The same, for ever; made if it is missing, with a random id and not confirmed.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def confirm_mark(self, prefix: str, id: str) -> None:
        """Once this returns, the mark with that id is confirmed, if there is one.

        Raises: SinkUnavailable, LaneBlocked.
        """


class Heartbeats(Protocol):
    """Shows the processes that share a database to each other."""

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        """Once this returns, others see that this process lives, or that it has ended.

        A process before this one on the same mirror is no longer shown.

        Returns: the beats of all processes, by their ids.
        Raises: SinkUnavailable, LaneBlocked.
        """


class Shelves(Protocol):
    """Dead letters, which the database refuses, and kept events of unknown types."""

    async def find(self, selection: Selection, limit: int) -> dict[str, Any]:
        """As `GET /dead` answers it: `total`, `groups`, and the newest `letters`, at most `limit`.

        Of unknown events, the `UNKNOWN_GROUPS` largest groups.
        Raises: SinkUnavailable, LaneBlocked.
        """

    async def count_dead(self) -> dict[str, int]:
        """How many there are, by lane. Raises: SinkUnavailable, LaneBlocked."""

    async def replay(
        self, selection: Selection, tables: Mapping[str, Table], check: Check
    ) -> tuple[dict[str, int], int]:
        """Put events into the tables of their lanes, each once, as rows by `check`.

        Once this returns, what is refused bears the new reason.

        Returns: how many are there, by lane; how many stay.
        Raises: SinkUnavailable, LaneBlocked: some may be there, the others are as they were.
        """

    async def drop(self, selection: Selection) -> int:
        """Remove them for good, some at a time; how many there were.

        Raises: SinkUnavailable, LaneBlocked: some may be gone.
        """

    async def samples(self, names: Sequence[str], each: int) -> dict[str, list[str]]:
        """The newest unknown events of each of these names, at most `each`, as they were sent.

        Raises: SinkUnavailable, LaneBlocked.
        """


class Upkeep(Protocol):
    """Keeps tables in order, by their `partition` and `retention_s`; where there are none, nothing.

    It acts on tables alone that datapipe has made or adopted.
    """

    async def make_ahead(self, table: Table) -> list[str]:
        """Once this returns, a table that is there has partitions for now and a few periods more.

        Returns: the DDL that has been run.
        Raises: SinkUnavailable: again later; LaneBlocked: a person must act.
        """

    async def remove_expired(self, table: Table) -> bool:
        """Remove a little of what is older than the table's retention, by the database's clock.

        Returns: whether there is more. Nothing is done while another process does it.
        Raises: SinkUnavailable: again later; LaneBlocked: a person must act.
        """

    async def adopt(self, table: Table, say: Callable[[str], None]) -> None:
        """Say what it will mean, line by line; then have the table kept in order as one of ours.

        Raises: SinkUnavailable; LaneBlocked: it can't be.
        """


class Database(Sink, Ledger, Heartbeats, Shelves, Upkeep, Protocol):
    """All five, for whoever opens it; a user asks for the one that it needs."""


def table_of(kind: Kind) -> Table:
    """The table that an event type's rows go into."""
    return Table(kind.name, kind.columns, kind.partition, kind.retention_s)


class SinkPlugin(Plugin):
    """What an entry point of `datapipe.sinks` names; its fields are those of `sink_options`.

    The entry point's name is the scheme of `database_url`.

    Attributes:
        is_file: whether the database is a file of this machine, and its URL `scheme:///path`.
        has_schemas: whether `database_schema` means anything to it.
        has_partitions: whether event types may have a partition and a retention.
        limits: what it can't hold of an event.
    """

    is_file: ClassVar[bool] = False
    has_schemas: ClassVar[bool] = False
    has_partitions: ClassVar[bool] = False
    limits: ClassVar[Limits] = Limits()

    def faults(self, settings: Settings) -> Iterator[tuple[str, str]]:
        """See `Plugin.faults`."""
        url, scheme = settings.database_url, settings.sink_kind
        if self.is_file and (why := urls.file_fault(url)):
            yield "database_url", why
        elif url and not url.startswith(f"{scheme}://"):
            yield "database_url", f"must begin with {scheme}://"
        if not self.has_schemas and settings.database_schema != Settings().database_schema:
            yield "database_schema", f"{scheme}:// has no schemas: leave it out"

    def settled(self, settings: Settings, folder: Path) -> Settings:
        """See `Plugin.settled`."""
        if not self.is_file:
            return settings
        url = urls.absolute_url(settings.database_url, folder)
        return structs.replace(settings, database_url=url)

    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Database]:
        """Open the sink; the database need not be there yet.

        Args: process: id of this process, for the ledger.
        Raises: ConfigError: this process can't have it.
        """
        raise NotImplementedError


def open_sink(settings: Settings, process: str) -> AbstractAsyncContextManager[Database]:
    """See `SinkPlugin.open`: the sink that the settings name."""
    found: SinkPlugin = plugin(settings, "sink")
    return found.open(settings, process)
