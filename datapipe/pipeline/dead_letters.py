"""Dead letters: how they are selected, and checked again before they are put back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datapipe import sinks
from datapipe.errors import EventRejected, LaneBlocked, Reason, SinkUnavailable
from datapipe.events.registry import Registry
from datapipe.events.types import neutral_time
from datapipe.events.unknown import UnknownType
from datapipe.pipeline.records import BODY_SHOWN
from datapipe.sinks import Selection, table_of

SHOWN_S = 1.0  # the page must not wait for a database that does not answer
_SHOWN_LETTERS = 200


def selection_of(wanted: Any) -> Selection:
    """From `{"ids": [...]}`, `{"lane": L, "sqlstate": S}` or `{"all": true}`.

    Raises: EventRejected: it is none of these; all must be asked for explicitly.
    """
    if isinstance(wanted, Mapping):
        keys = set(wanted)
        if (some := ids_or_all(wanted)) is not None:
            return some
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
    """Looks at dead letters, puts them back, drops them.

    Attributes: replayed: rows that were put back, of unknown events, too, by lane.
    """

    def __init__(self, database: sinks.Shelves, registry: Registry) -> None:
        self.replayed: Counter[str] = Counter()
        self._database = database
        self._registry = registry

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
        return back, stay

    async def drop(self, selection: Selection) -> dict[str, Any]:
        """`{"dropped": n}`. Raises: SinkUnavailable, LaneBlocked."""
        return {"dropped": await self._database.drop(selection)}

    def _row(self, lane: str, event: bytes, received_at: str) -> bytes:
        kind, at = self._registry.kinds.get(lane), neutral_time(received_at)
        if kind is None:
            detail = f"no event type {lane!r} is registered here"
            raise EventRejected(Reason.UNSUPPORTED_EVENT, detail)
        if isinstance(kind, UnknownType):
            return kind.replayed(event, at)
        return kind.look_closer(event, at)
