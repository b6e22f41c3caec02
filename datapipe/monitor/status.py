"""What the service shows of itself: reads books and health, changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from datapipe.health import Health
from datapipe.mirrors import MirrorState
from datapipe.monitor import formats
from datapipe.monitor.aggregate import BOOKS, IN_HAND, together, together_series
from datapipe.monitor.history import History, Reading
from datapipe.monitor.metrics import Metrics, Samples
from datapipe.monitor.peers import Others, Peers
from datapipe.monitor.summary import summary
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.coordinator import Coordinator
from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.pipeline.lane import Lane
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Rate, Records, iso, now
from datapipe.version import __version__

_JUDGED = (
    "ingest", "database", "mirror", "books", "shares", "room", "dead_letters", "leftovers", "ended",
    "peers",
)  # fmt: skip
_NOT_TOLD = {"ended", "peers"}  # to others: it may have asked long ago
NEARLY_FULL = 0.8  # of the mirror
_NAMED = 3  # lanes without room
_STEP = 50  # lanes: some milliseconds
T = TypeVar("T")


@dataclass
class Status:
    """Puts `/status.json` together; `docs/status.md` explains its keys.

    Attributes:
        peers: those that the page tells of.
        local: those that share our `data_dir`, of which `/metrics` tells; often the same.
    """

    buffer: Buffer
    loader: Loader
    coordinator: Coordinator
    records: Records
    dead: DeadLetters
    metrics: Metrics
    process: str
    peers: Peers
    local: Peers

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._started_at = now()
        self._others = Others(self.peers)
        self._local = self._others if self.local is self.peers else Others(self.local)
        # what keeps no health of its own, or behind its interface: judged each second
        self._judged = {part: Health(part) for part in _JUDGED}
        self._filling = Rate()  # bytes of the mirror, per second
        self.history = History(self._started)
        self._month = datetime.now(UTC).month
        self._before_month = 0  # requests to the mirror in months that are over
        self._refused = 0  # events that became dead letters, at the last reading
        self.tick()

    def tick(self) -> None:
        """Once a second: take the readings of which charts and rates are made."""
        moment = time.monotonic()
        mirror = self.buffer.mirror.state()
        self._filling.take(mirror.bytes, moment)
        if self._month != (month := datetime.now(UTC).month):
            self._month, self._before_month = month, sum(mirror.calls.values())
        readings = {
            name: Reading(lane.accepted, lane.loaded, lane.waiting.events)
            for name, lane in self.buffer.lanes.items()
        }
        self.history.take(moment, readings)
        if self._refused != (refused := sum(lane.dead for lane in self.buffer.lanes.values())):
            self._refused = refused
            self.dead.count_soon()
        self._judge()

    # --- health ---

    def not_ready(self) -> str | None:
        """Why an event would be refused now, or None."""
        if self.buffer.stopping:
            return "shutting down"
        if (why := self._mirror_error()) is not None:
            return why
        return self.buffer.mirror.state().full

    def _mirror_error(self) -> str | None:
        mirror = self.buffer.mirror.state()
        if mirror.up and self.buffer.health.up:
            return None
        return mirror.error or self.buffer.health.error or "no answer"

    def parts(self) -> Iterator[Health]:
        """The health of all that this process consists of."""
        self._judge()
        yield from self._judged.values()
        yield from (self.buffer.health, self.buffer.removal, *self.coordinator.parts)
        yield self.dead.health
        yield from (lane.health for _, lane in sorted(self.buffer.lanes.items()))

    def _judge(self) -> None:
        mirror, database = self.buffer.mirror.state(), self.loader.sink.state()
        database_error = (database.error or "no answer") if database.up is False else None
        balanced = all(lane.balanced for lane in self.buffer.lanes.values())
        full = sorted(self.buffer.mirror.full(self.buffer.lanes).values())
        used = _used(mirror) if mirror.fullest is None else mirror.fullest
        whose = "" if mirror.fullest is None else "of the fullest event type's stream is "
        errors = {
            "ingest": self.not_ready(),
            "database": database_error,
            "mirror": self._mirror_error(),
            "books": None if balanced else "",
            "shares": _some(full) if full else None,
            "room": f"{used:.0%} {whose}used" if used >= NEARLY_FULL else None,
            "leftovers": f"{formats.count(mirror.left)} messages, not counted below"
            if mirror.left else None,
            "dead_letters": "" if any(self.dead.present.values()) else None,
            "ended": ", ".join(self._others.ended) if self._others.ended_lately else None,
            "peers": "" if self._others.silent_lately else None,
        }  # fmt: skip
        began = time.perf_counter()
        for part, error in errors.items():
            if error is not None:
                self._judged[part].fails(began, error)
            elif part != "database" or database.up:
                self._judged[part].works(began)

    # --- all processes ---

    async def refresh(self, *, history: bool = True) -> None:
        """Ask the other processes; what follows is for all of them. `whole` needs the history."""
        await self._others.refresh(history=history)

    def snapshot(self) -> dict[str, Any]:
        """All numbers at one moment, of all processes, without the series of the charts."""
        return self._of_all(self._own(dict(self._lanes()), list(map(_part, self.parts()))))

    async def current(self) -> dict[str, Any]:
        """The same, but each lane's numbers are of a moment of their own.

        Thousands of lanes would hold up the event loop.
        """
        return await asyncio.to_thread(self._of_all, await self._own_in_steps())

    def _of_all(self, own: dict[str, Any]) -> dict[str, Any]:
        others = self._others
        status = together(own, others.answers)
        status |= {"silent": others.silent, "ended": others.ended if others.ended_lately else []}
        return status | {"summary": summary(status)}

    async def whole(self) -> dict[str, Any]:
        """All that the page shows, but the last refusals."""
        return await self.current() | {"history": await self.series()}

    async def series(self) -> dict[str, Any]:
        """The key `history` of `/status.json`."""
        own = dict(await _in_steps(self.history.series()))
        others, shared = self._others.histories, self.buffer.mirror.traits.shared

        def history() -> dict[str, Any]:
            return together_series([own, *others], shared=shared)

        return await asyncio.to_thread(history)  # it can be a million numbers

    async def for_peers(self, history: bool = True) -> dict[str, Any]:
        """What this process answers the others. Args: history: also the series of the charts."""
        own = await self._own_in_steps() | {"histograms": self.metrics.histograms()}
        own["parts"] = [part for part in own["parts"] if part["part"] not in _NOT_TOLD]
        if not history:
            return own
        return own | {"history": dict(await _in_steps(self.history.series()))}

    async def of_data_dir(self) -> tuple[dict[str, Any], list[Samples]]:
        """All numbers, and the histograms, of the processes that share our `data_dir`, now."""
        await self._local.refresh(history=False)
        others = self._local.answers
        histograms = [self.metrics.histograms(), *(each["histograms"] for each in others)]
        own = await self._own_in_steps()
        return await asyncio.to_thread(together, own, others), histograms

    # --- this process ---

    async def _own_in_steps(self) -> dict[str, Any]:
        lanes = dict(await _in_steps(self._lanes()))
        return self._own(lanes, await _in_steps(map(_part, self.parts())))

    def _own(self, lanes: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "version": __version__,
            "process": self.process,
            "host": self.coordinator.host,
            "now": now(),
            "started_at": self._started_at,
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "ready": self.not_ready() is None,
            "lanes": lanes,
            "rejected": dict(self.records.rejected),
            "dead_letters": self._dead_letters(),
            "keys": {name: use.shown() for name, use in sorted(self.records.keys.items())},
            "mirror": self._mirror(),
            "database": self._database(),
            "parts": parts,
            "recent_loads": self.records.loads(),
        }

    def _dead_letters(self) -> dict[str, Any] | None:
        if (at := self.dead.counted_at) is None:
            return None
        lanes = dict.fromkeys(self.buffer.lanes, 0) | dict(self.dead.present)
        return {"at": iso(at), "lanes": dict(sorted(lanes.items()))}

    def _lanes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        full = self.buffer.mirror.full(self.buffer.lanes)
        for name, lane in sorted(self.buffer.lanes.items()):
            yield name, self._lane(lane) | {"full": name in full}

    def _lane(self, lane: Lane) -> dict[str, Any]:
        schedule = self.loader.schedules.get(lane.name)
        last = schedule.last_load if schedule else None
        accepted, loaded = self.history.rates(lane.name)
        # while the whole database is away that is said once, at the top
        hushed = lane.blocked is not None or self.loader.sink.state().up is False
        return {
            **{key: getattr(lane, key) for key in (*BOOKS, *IN_HAND) if key != "waiting"},
            "waiting": lane.waiting.events,
            "replayed": self.dead.replayed[lane.name],
            "balanced": lane.balanced,
            "in_memory": lane.waiting.in_memory,
            "parked": lane.waiting.parked,
            "waiting_bytes": lane.waiting.bytes,
            "oldest_seconds": round(lane.oldest_seconds, 3),
            "accepted_per_second": accepted,
            "loaded_per_second": loaded,
            "state": self._state(lane),
            "blocked": lane.blocked,
            "error": None if hushed else lane.health.error,
            "last_load": last and {"at": last.at, "rows": last.rows, "seconds": last.seconds},
            "slow_load": _slow_load(lane.health),
            "next_load_seconds": _rounded(self.loader.next_load_seconds(lane.name), 3),
            "idle": self.history.idle(lane.name),
        }

    def _state(self, lane: Lane) -> str:
        schedule = self.loader.schedules.get(lane.name)
        if lane.blocked is not None:
            return "blocked"
        if lane.health.busy:
            return "loading"
        if schedule is not None and schedule.failures and lane.waiting.events:
            return "retrying"
        return "waiting" if lane.waiting.events else "empty"

    def _mirror(self) -> dict[str, Any]:
        mirror = self.buffer.mirror.state()
        requests, rate = sum(mirror.calls.values()), self._filling.per_second()
        room = max(0, mirror.max_bytes - mirror.bytes)
        return {
            "kind": mirror.kind,
            "shared": self.buffer.mirror.traits.shared,
            "up": self._mirror_error() is None,
            "error": mirror.error,
            "bytes": mirror.bytes,
            "max_bytes": mirror.max_bytes,
            "used": round(_used(mirror), 4),
            "fullest": _rounded(mirror.fullest, 4),
            "seconds_left": round(room / rate) if rate > 0 else None,
            "append_seconds": _rounded(self.buffer.append_seconds, 5),
            "requests": requests,
            "calls": dict(mirror.calls),
            "requests_this_month": requests - self._before_month,
            "expires_seconds": mirror.expires_s,
            "left_messages": mirror.left,
            "left_seconds": None if mirror.left_s is None else round(mirror.left_s),
        }

    def _database(self) -> dict[str, Any]:
        database = self.loader.sink.state()
        return {
            "up": bool(database.up),
            "error": database.error,
            "refuses": database.refuses,
            "product": database.product,
            "version": database.version,
            "schema": database.schema,
            "answer_seconds": _rounded(database.answer_s, 5),
        }


async def _in_steps(items: Iterable[T]) -> list[T]:
    """All of them; others have their turn after each few."""
    made = []
    for item in items:
        made.append(item)
        if len(made) % _STEP == 0:
            await asyncio.sleep(0)
    return made


def _some(texts: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(texts) - _NAMED
    return "; ".join(texts[:_NAMED]) + (f"; and {formats.count(more)} more" if more > 0 else "")


def _used(mirror: MirrorState) -> float:
    return mirror.bytes / mirror.max_bytes if mirror.max_bytes else 0.0


def _part(health: Health) -> dict[str, Any]:
    state = health.state()
    times = {key: state[key] and iso(state[key]) for key in ("since", "at", "doing_since")}
    return state | times


def _slow_load(health: Health) -> dict[str, Any] | None:
    state = health.state()
    if not state["slow"]:
        return None
    return {
        "seconds": round(time.time() - state["doing_since"], 1),
        "waits_for": state["waits_for"],
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
