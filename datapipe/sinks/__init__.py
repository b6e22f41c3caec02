"""Sink: where segments are loaded into, exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from datapipe.events.segment import Segment
from datapipe.events.types import Column, EventType
from datapipe.settings import Plugin, Settings, plugin


@dataclass(slots=True, frozen=True)
class Table:
    """The table of a lane, as its event type wants it."""

    name: str
    columns: tuple[Column, ...]


@dataclass(slots=True)
class Loaded:
    """What became of the events of one load: their sum is what the segments held.

    `refused` names the first few SQLSTATEs and messages of dead letters, for the log.
    """

    loaded: int = 0
    duplicate: int = 0
    dead: int = 0
    refused: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class SinkState:
    """For the page; `up` is None until the first real work was tried.

    `answer_s` is what the last small piece of work took, such as the heartbeat.
    """

    up: bool | None
    error: str | None
    version: str | None
    schema: str
    answer_s: float | None = None


@dataclass(slots=True, frozen=True)
class Heartbeat:
    """What a process tells the others.

    Attributes:
        mirror: the store that only this process appends to: a journal's id, or the process's own.
        oldest_waiting: Unix time of its oldest event that is not loaded yet.
        ended: it stops now, and beats no more.
    """

    process: str
    mirror: str
    oldest_waiting: float | None
    ended: bool = False


@dataclass(slots=True, frozen=True)
class Beat:
    """What the database says of a process: a count that rises while it lives."""

    count: int
    ended: bool


# the COPY row of an event: lane, its JSON, received_at; raises EventRejected
Check = Callable[[str, bytes, str], bytes]


@dataclass(slots=True, frozen=True)
class Selection:
    """Which dead letters are meant: those of `ids`, else all that fit `lane` and `sqlstate`."""

    ids: tuple[int, ...] | None = None
    lane: str | None = None
    sqlstate: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """An SQL condition and its arguments."""
        conditions: list[str] = ["true"]
        values: list[Any] = []
        if self.ids is not None:
            conditions.append("id = ANY(%s)")
            values.append(list(self.ids))
        for column in ("lane", "sqlstate"):
            if (value := getattr(self, column)) is not None:
                conditions.append(f"{column} = %s")
                values.append(value)
        return " AND ".join(conditions), values


class Sink(Protocol):
    """Loads segments; every method that talks to the database can raise SinkUnavailable."""

    async def load(
        self, table: Table, segments: Sequence[Segment], *, accept_dead: bool = False
    ) -> Loaded:
        """Write all rows of the segments that the ledger does not know, in one transaction.

        Safe to repeat. Raises: SinkUnavailable: again later; LaneBlocked: a person must act.
        Refused rows are dead letters, counted and not raised.
        """

    async def waits(self) -> dict[str, str]:
        """What the database says that loads under way wait for, by lane; not those that work."""

    async def prepare(self, table: Table) -> None:
        """Make the table, or its missing columns, if that was not done yet.

        Raises: SinkUnavailable, LaneBlocked.
        """

    async def keep_house(self, beat: Heartbeat, removed: Sequence[str]) -> dict[str, Beat]:
        """Show that this process lives, and drop ledger rows that nothing can meet any more.

        Args: removed: ids of segments that the mirror has forgotten for good.
        Returns: the beats of all processes, by their ids.
        """

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        """Which of these segments the ledger knows."""

    async def forget_source(self, source: str, process: str) -> None:
        """Drop the ledger rows that other processes wrote for a journal that is now drained."""

    async def dead(self, selection: Selection, limit: int) -> dict[str, Any]:
        """Dead letters as `GET /dead` answers them."""

    async def replay(
        self, selection: Selection, tables: Mapping[str, Table], check: Check
    ) -> tuple[dict[str, int], int]:
        """Put dead letters back into their tables; rows by lane, and how many stay dead.

        Raises: SinkUnavailable, LaneBlocked: the letters in hand stay what they are.
        """

    async def drop(self, selection: Selection) -> int:
        """Remove dead letters for good; how many."""

    def abort(self) -> None:
        """End loads that are under way, at once; what they did is rolled back or unknown."""

    def state(self) -> SinkState: ...

    async def hint(self) -> str:
        """A line for the shell that shows rows. Raises: SinkUnavailable."""

    async def check(self, tables: Sequence[Table]) -> list[tuple[str, str]]:
        """Reach the database; findings as (ok, warn, fail or away; text). Changes nothing."""


def table_of(kind: EventType) -> Table:
    """The table that an event type's rows go into."""
    return Table(kind.name, kind.columns)


class SinkPlugin(Plugin):
    """What an entry point of `datapipe.sinks` names; its fields are those of `sink_options`.

    The entry point's name is the scheme of `database_url`.
    """

    def open(self, settings: Settings, process: str) -> AbstractAsyncContextManager[Sink]:
        """Open the sink; the database need not be there yet.

        Args: process: id of this process, for the ledger.
        Raises: ConfigError: this process can't have it.
        """
        raise NotImplementedError


def open_sink(settings: Settings, process: str) -> AbstractAsyncContextManager[Sink]:
    """See `SinkPlugin.open`: the sink that the settings name."""
    found: SinkPlugin = plugin(settings, "sink")
    return found.open(settings, process)
