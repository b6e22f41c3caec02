"""Dead letters: how they are selected, counted, and checked again before they are put back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from datapipe import sinks
from datapipe.errors import EventRejected, LaneBlocked, Reason, SinkUnavailable
from datapipe.events.registry import Registry
from datapipe.events.rows import neutral_time
from datapipe.events.unknown import UnknownType
from datapipe.health import Health
from datapipe.pipeline.records import BODY_SHOWN
from datapipe.pipeline.tasks import Failed, background, repeat
from datapipe.sinks import Selection, table_of

SHOWN_S = 1.0  # the page must not wait for a database that does not answer
_SHOWN_LETTERS = 200
_COUNT_S = 10.0  # between two counts, unless there is a reason for one
_REST = 20  # times as long as the last count took: none is made, where there are millions


def selection_of(wanted: Any) -> Selection:
    """From `{"ids": [...]}`, `{"lane": L, "sqlstate": S}` or `{"all": true}`.

    An SQLSTATE of null, as groups without one have it, selects these.
    Raises: EventRejected: it is none of these; all must be asked for explicitly.
    """
    if isinstance(wanted, Mapping):
        keys = set(wanted)
        if (some := ids_or_all(wanted)) is not None:
            return some
        if "sqlstate" in keys and wanted["sqlstate"] is None:
            wanted = {**wanted, "sqlstate": ""}
        texts = all(isinstance(value, str) and storable(value) for value in wanted.values())
        if keys and keys <= {"lane", "sqlstate"} and texts:
            return Selection(lane=wanted.get("lane"), sqlstate=wanted.get("sqlstate"))
    raise EventRejected(
        Reason.BAD_VALUE, 'say which: {"ids": [1, 2]}, {"lane": L, "sqlstate": S} or {"all": true}'
    )


def ids_or_all(wanted: Mapping[str, Any]) -> Selection | None:
    """From `{"ids": [...]}` or `{"all": true}`; None: it is neither."""
    keys, ids = set(wanted), wanted.get("ids")
    if keys == {"ids"} and isinstance(ids, list) and all(map(_is_id, ids)):
        return Selection(ids=tuple(ids))
    return Selection() if keys == {"all"} and wanted["all"] is True else None


def _is_id(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def storable(text: str) -> bool:
    """Whether any database could hold this text: ASCII, as lanes and SQLSTATEs are; no U+0000."""
    return "\0" not in text and text.isascii()


def shortened(event: str) -> str:
    """An event as the page shows it."""
    return event if len(event) <= BODY_SHOWN else f"{event[:BODY_SHOWN]}..."


class DeadLetters:
    """Looks at dead letters, puts them back, drops them, counts them.

    Attributes:
        replayed: rows that were put back, of unknown events, too, by lane.
        present: how many there are in the database, whoever wrote them; by lane.
        counted_at: when that was so, Unix time; None: they have not been counted yet.
        health: of the counting.
    """

    def __init__(self, database: sinks.Shelves, registry: Registry) -> None:
        self.replayed: Counter[str] = Counter()
        self.present: Mapping[str, int] = {}
        self.counted_at: float | None = None
        self.health = Health("count")
        self._changed = asyncio.Event()
        self._rest_s = 0.0
        self._database = database
        self._registry = registry

    # --- counting ---

    @asynccontextmanager
    async def counting(self, failed: Failed) -> AsyncIterator[None]:
        """Count them in the background; should that end with an error, `failed` gets it."""
        work = repeat(self._count, self.health, "dead letters not counted", 30.0, self._pause)
        async with background([work], failed):
            yield

    def count_soon(self) -> None:
        """There are more, or fewer."""
        self._changed.set()

    async def _count(self) -> float:
        self._changed.clear()
        began, at = time.monotonic(), time.time()
        self.present = await self._database.count_dead()
        self.counted_at = at
        self._rest_s = _REST * (time.monotonic() - began)
        return _COUNT_S

    async def _pause(self, pause_s: float) -> None:
        await asyncio.sleep(self._rest_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._changed.wait()

    # --- what people do ---

    async def look(self, selection: Selection, limit: int) -> dict[str, Any]:
        """Raises: SinkUnavailable, LaneBlocked."""
        return await self._database.find(selection, limit)

    async def shown(self) -> dict[str, Any] | None:
        """For the page: groups, each with its newest event as `sample`; None: no answer in time."""
        try:
            async with asyncio.timeout(SHOWN_S):
                found = await self.look(Selection(), _SHOWN_LETTERS)
        except (SinkUnavailable, LaneBlocked, TimeoutError):
            return None
        for group in found["groups"]:
            reason = (group["lane"], group["sqlstate"])
            letters = (e for e in found["letters"] if (e["lane"], e["sqlstate"]) == reason)
            newest = next(letters, None)
            group["sample"] = shortened(bytes(newest["event"]).decode() if newest else "")
        return found

    async def replay(self, selection: Selection) -> dict[str, Any]:
        """`{"replayed": {lane: rows}, "dead": how many are refused again}`.

        Raises: SinkUnavailable, LaneBlocked.
        """
        back, stay = await self.put_back(selection)
        return {"replayed": back, "dead": stay}

    async def put_back(self, selection: Selection) -> tuple[dict[str, int], int]:
        """Replay events of any shelf: rows, by lane, and how many were refused.

        Raises: SinkUnavailable, LaneBlocked.
        """
        tables = {name: table_of(kind) for name, kind in self._registry.kinds.items()}
        back, stay = await self._database.replay(selection, tables, self._row)
        self.replayed.update(back)
        self.count_soon()
        return back, stay

    async def drop(self, selection: Selection) -> dict[str, Any]:
        """`{"dropped": n}`. Raises: SinkUnavailable, LaneBlocked."""
        dropped = await self._database.drop(selection)
        self.count_soon()
        return {"dropped": dropped}

    def _row(self, lane: str, event: bytes, received_at: str) -> bytes:
        kind, at = self._registry.kinds.get(lane), neutral_time(received_at)
        if kind is None:
            detail = f"no event type {lane!r} is registered here"
            raise EventRejected(Reason.UNSUPPORTED_EVENT, detail)
        if isinstance(kind, UnknownType):
            return kind.replayed(event, at)
        return kind.look_closer(event, at)
