"""What the service tells of itself: reads the books, changes nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from datapipe.health import Condition
from datapipe.monitor.aggregate import BOOKS, together, together_series
from datapipe.monitor.history import History, Reading, series_of
from datapipe.monitor.metrics import Metrics
from datapipe.monitor.peers import Peers
from datapipe.monitor.summary import Summary
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.dead_letters import DeadLetters
from datapipe.pipeline.lane import Lane
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Rate, Records, now
from datapipe.pipeline.schedule import Schedule
from datapipe.version import __version__


@dataclass
class Status:
    """Puts `/status.json` together; `docs/status.md` tells its keys."""

    buffer: Buffer
    loader: Loader
    records: Records
    dead: DeadLetters
    metrics: Metrics
    peers: Peers

    def __post_init__(self) -> None:
        self._others: list[dict[str, Any]] = []  # what the other processes last told
        self._started = time.monotonic()
        self._started_at = now()
        self._summary = Summary()
        self._filling = Rate()  # bytes of the mirror, per second
        self.history = History(self._started)
        self._month = datetime.now(UTC).month
        self._before_month = 0  # requests to the mirror in months that are over
        self.tick()

    def tick(self) -> None:
        """Once a second: take the readings of which pictures and rates are made."""
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

    def not_ready(self) -> str | None:
        """Why an event would be refused now, or None."""
        if self.buffer.stopping:
            return "shutting down"
        mirror = self.buffer.mirror.state()
        if not mirror.up or not self.buffer.health.up:
            return f"the mirror does not work: {mirror.error or 'no answer'}"
        return mirror.full

    async def refresh(self) -> None:
        """Ask the other processes; what follows is told for all of them."""
        self._others = await self.peers.ask("GET", "/status.json")

    def snapshot(self) -> dict[str, Any]:
        """All numbers at one moment, of all processes, without the series of the pictures."""
        status = together(self._own(), self._others)
        return status | {"summary": self._summary.of(status, self.not_ready())}

    async def whole(self) -> dict[str, Any]:
        """All that the page shows, but the last refusals."""
        points, others = self.history.points(), [other["history"] for other in self._others]

        def history() -> dict[str, Any]:
            return together_series([series_of(points), *others])

        # in a thread: it can be a million numbers
        return self.snapshot() | {"history": await asyncio.to_thread(history)}

    async def for_peers(self) -> dict[str, Any]:
        """What this process tells the others."""
        own = self._own() | {"histograms": self.metrics.histograms()}
        return own | {"history": await asyncio.to_thread(series_of, self.history.points())}

    def histograms(self) -> list[dict[str, Any]]:
        """Those of all processes."""
        return [self.metrics.histograms(), *(other["histograms"] for other in self._others)]

    def _own(self) -> dict[str, Any]:
        full = self.buffer.mirror.full(self.buffer.lanes)
        lanes = {
            name: self._lane(lane) | {"full": name in full}
            for name, lane in sorted(self.buffer.lanes.items())
        }
        return {
            "version": __version__,
            "now": now(),
            "started_at": self._started_at,
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "ready": self.not_ready() is None,
            "lanes": lanes,
            "rejected": dict(self.records.rejected),
            "mirror": self._mirror(),
            "database": self._database(),
            "recent_loads": self.records.loads(),
        }

    def refusals(self) -> list[dict[str, Any]]:
        """The last events that were refused: for admins, they show what clients sent."""
        return self.records.refusals()

    def _lane(self, lane: Lane) -> dict[str, Any]:
        schedule = self.loader.schedules.get(lane.name)
        last = schedule.last_load if schedule else None
        seconds = self.loader.next_load_seconds(lane.name)
        condition = lane.health.condition()
        accepted, loaded = self.history.rates(lane.name)
        # while the whole database is away that is told once, at the top
        outage = self.loader.sink.state().up is False
        return {
            **{key: getattr(lane, key) for key in BOOKS if key != "waiting"},
            "waiting": lane.waiting.events,
            "replayed": self.dead.replayed[lane.name],
            "balanced": lane.balanced,
            "in_memory": lane.waiting.in_memory,
            "parked": lane.waiting.parked,
            "waiting_bytes": lane.waiting.bytes,
            "oldest_seconds": round(lane.oldest_seconds, 3),
            "accepted_per_second": accepted,
            "loaded_per_second": loaded,
            "state": self._state(lane, schedule),
            "blocked": lane.blocked,
            "error": None if outage or lane.blocked else condition.error,
            "last_load": last and {"at": last.at, "rows": last.rows, "seconds": last.seconds},
            "slow_load": _slow_load(condition),
            "next_load_seconds": None if seconds is None else round(seconds, 3),
        }

    def _state(self, lane: Lane, schedule: Schedule | None) -> str:
        if lane.blocked is not None:
            return "blocked"
        if schedule is not None and schedule.busy:
            return "loading"
        if schedule is not None and schedule.failures and lane.waiting.events:
            return "retrying"
        return "waiting" if lane.waiting.events else "empty"

    def _mirror(self) -> dict[str, Any]:
        mirror = self.buffer.mirror.state()
        requests = sum(mirror.calls.values())
        rate = self._filling.per_second()
        left = max(0, mirror.max_bytes - mirror.bytes) / rate if rate > 0 else None
        return {
            "kind": mirror.kind,
            "up": mirror.up and self.buffer.health.up,
            "error": mirror.error,
            "bytes": mirror.bytes,
            "max_bytes": mirror.max_bytes,
            "used": round(mirror.bytes / mirror.max_bytes, 4) if mirror.max_bytes else 0.0,
            "seconds_left": None if left is None else round(left),
            "append_seconds": _rounded(self.buffer.append_seconds),
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
            "version": database.version,
            "schema": database.schema,
            "answer_seconds": _rounded(database.answer_s),
        }


def _slow_load(condition: Condition) -> dict[str, Any] | None:
    if condition.doing_since is None or not condition.slow:
        return None
    seconds = round(time.time() - condition.doing_since, 1)
    return {"seconds": seconds, "waits_for": condition.waits_for}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 5)
