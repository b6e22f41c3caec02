"""Kept events of unknown types: shown by name, moved once their type is known, expired."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from datapipe import sinks
from datapipe.errors import EventRejected, LaneBlocked, Reason, SinkUnavailable
from datapipe.events.fitting import fitting
from datapipe.events.registry import Registry
from datapipe.pipeline.dead_letters import (
    SHOWN_S,
    DeadLetters,
    ids_or_all,
    shortened,
    storable,
)
from datapipe.sinks import Selection, Shelf

ALL = Selection(shelf=Shelf.UNKNOWN)

_SAMPLES_BYTES = 16_777_216  # of all names together, at most
_SAMPLES = 100  # of one name


def selection_of(wanted: Any) -> Selection:
    """From `{"ids": [...]}`, `{"event_name": N}` or `{"all": true}`.

    Raises: EventRejected: it is none of these; all must be asked for explicitly.
    """
    if isinstance(wanted, Mapping):
        if (some := ids_or_all(wanted)) is not None:
            return replace(some, shelf=Shelf.UNKNOWN)
        name = wanted.get("event_name")
        if set(wanted) == {"event_name"} and isinstance(name, str) and storable(name):
            return replace(ALL, lane=name)
    raise EventRejected(
        Reason.BAD_VALUE, 'say which: {"ids": [1, 2]}, {"event_name": N} or {"all": true}'
    )


class Unknown:
    """Looks at kept events, replays them into the tables of their types, drops them.

    Attributes: kept: whether more may come, by the settings.
    """

    def __init__(self, database: sinks.Shelves, registry: Registry, dead: DeadLetters) -> None:
        self.kept = registry.keeps_unknown
        self._database = database
        self._registry = registry
        self._dead = dead

    async def look(self, selection: Selection, limit: int) -> dict[str, Any]:
        """As `GET /unknown` answers it: see `Shelves.find`.

        Each group has its newest event as `sample`, whether its type is `registered` by now, and
        else as `events` what to add to the setting of that name, as far as samples tell.
        Raises: SinkUnavailable, LaneBlocked.
        """
        found = await self._database.find(selection, limit)
        names = [group["event_name"] for group in found["groups"]]
        samples = await self._samples(names)
        fits = await asyncio.to_thread(self._fits, samples)  # thousands of events take their time
        for group in found["groups"]:
            name = group["event_name"]
            newest = next(iter(samples.get(name, ())), None)
            group["sample"] = newest and msgspec.Raw(newest.encode())
            group["registered"] = name in self._registry.types
            group["events"] = fits.get(name)
        return found

    async def _samples(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The newest events of each; where there is room for few, of the names that come first."""
        most = max(1, _SAMPLES_BYTES // self._registry.unknown.max_len)
        names = names[:most]
        each = min(_SAMPLES, most // max(1, len(names)))
        return await self._database.samples(names, each)

    def _fits(self, samples: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict[str, str]]]:
        return {
            name: {name: fitting(events, self._registry.unknown.limits)}
            for name, events in samples.items()
            if events and name not in self._registry.types
        }

    async def shown(self) -> dict[str, Any] | None:
        """For the page: groups, samples shortened; None: no answer in time."""
        try:
            async with asyncio.timeout(SHOWN_S):
                found = await self.look(ALL, 0)
        except (SinkUnavailable, LaneBlocked, TimeoutError):
            return None
        for group in found["groups"]:
            group["sample"] = shortened(bytes(group["sample"] or b"").decode())
            group["said"] = said(group)
        return found

    async def replay(self, selection: Selection) -> dict[str, Any]:
        """`{"replayed": {name: rows}, "refused": how many, "unknown": how many are still there}`.

        Those whose type is not registered are left as they are.
        Raises: SinkUnavailable, LaneBlocked.
        """
        known = replace(selection, lanes=tuple(self._registry.types))
        back, refused = await self._dead.put_back(known)
        left: int = (await self._database.find(selection, 0))["total"]
        return {"replayed": back, "refused": refused, "unknown": left}

    async def drop(self, selection: Selection) -> dict[str, Any]:
        """`{"dropped": n}`. Raises: SinkUnavailable, LaneBlocked."""
        return {"dropped": await self._database.drop(selection)}


def said(group: Mapping[str, Any]) -> str:
    """A group of `Unknown.look`, for people."""
    name, count = group["event_name"], f"{group['count']:,}"
    if group["registered"]:
        refused = f"; {group['refused']:,} refused: {group['message']}" if group["refused"] else ""
        return f"{name}: {count}, whose type is registered by now: replay moves them{refused}"
    if group["events"] is None:
        return f"{name}: {count} waiting to be named"
    fits = msgspec.json.format(msgspec.json.encode(group["events"]), indent=0).decode()
    return f"{name}: {count} waiting to be named; a type that fits them: {fits}"
