"""What the service tells of itself: reads the books, changes nothing."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from datapipe.buffer import Buffer
from datapipe.dead import DeadLetters
from datapipe.ingest import Ingest
from datapipe.lane import Lane
from datapipe.loader import Loader
from datapipe.version import __version__

_BOOKS = ("accepted", "recovered", "loaded", "duplicate", "dead", "waiting")


class Status:
    """Puts `/status.json` together; see the README for its keys."""

    def __init__(self, buffer: Buffer, loader: Loader, ingest: Ingest, dead: DeadLetters) -> None:
        self._dead = dead
        self._buffer = buffer
        self._loader = loader
        self._ingest = ingest
        self._started = time.monotonic()
        self._state = "healthy"
        self._since: str | None = None

    def not_ready(self) -> str | None:
        """Why an event would be refused now, or None."""
        if self._ingest.stopping:
            return "shutting down"
        mirror = self._buffer.mirror.state()
        if not mirror.up or not self._buffer.mirror_up:
            return f"the mirror does not work: {mirror.error or 'no answer'}"
        return mirror.full

    def snapshot(self) -> dict[str, Any]:
        """All numbers at one moment."""
        lanes = {name: self._lane(lane) for name, lane in sorted(self._buffer.lanes.items())}
        books: dict[str, Any] = {key: sum(lane[key] for lane in lanes.values()) for key in _BOOKS}
        books["balanced"] = all(lane.balanced for lane in self._buffer.lanes.values())
        mirror = self._buffer.mirror.state()
        database = self._loader.sink.state()
        return {
            "version": __version__,
            "now": _iso(time.time()),
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "ready": self.not_ready() is None,
            "processes": 1,
            "summary": self._summary(books["waiting"]),
            "books": books,
            "lanes": lanes,
            "rejected": dict(self._ingest.rejected),
            "mirror": {
                "kind": mirror.kind,
                "up": mirror.up and self._buffer.mirror_up,
                "error": mirror.error,
                "bytes": mirror.bytes,
                "max_bytes": mirror.max_bytes,
                "requests": sum(mirror.calls.values()),
                "calls": dict(mirror.calls),
            },
            "database": {
                "up": bool(database.up),
                "error": database.error,
                "version": database.version,
                "schema": database.schema,
            },
        }

    def _lane(self, lane: Lane) -> dict[str, Any]:
        schedule = self._loader.schedules.get(lane.name)
        last = schedule.last_load if schedule else None
        seconds = self._loader.next_load_seconds(lane.name)
        return {
            "accepted": lane.accepted,
            "recovered": lane.recovered,
            "loaded": lane.loaded,
            "duplicate": lane.duplicate,
            "dead": lane.dead,
            "replayed": self._dead.replayed[lane.name],
            "waiting": lane.waiting,
            "in_memory": lane.in_memory,
            "parked": lane.parked,
            "waiting_bytes": lane.waiting_bytes,
            "oldest_seconds": round(lane.oldest_seconds(), 3),
            "blocked": lane.blocked,
            "error": schedule.error if schedule else None,
            "last_load": last
            and {"at": _iso(last.at), "rows": last.rows, "seconds": round(last.seconds, 4)},
            "next_load_seconds": None if seconds is None else round(seconds, 3),
        }

    def _summary(self, waiting: int) -> dict[str, Any]:
        state, text = self._sentence(waiting)
        if state != self._state:
            self._state, self._since = state, None if state == "healthy" else _iso(time.time())
        return {"state": state, "text": text, "since": self._since}

    def _sentence(self, waiting: int) -> tuple[str, str]:
        if (why := self.not_ready()) is not None:
            return "refusing", f"Events are refused: {why}."
        database = self._loader.sink.state()
        if database.up is False:
            return "database_down", (
                f"PostgreSQL does not answer: {database.error}. Events are kept, "
                f"{waiting:,} waiting."
            )
        blocked = [name for name, lane in self._buffer.lanes.items() if lane.blocked is not None]
        if blocked:
            return "lane_blocked", (
                f"Blocked until somebody acts: {', '.join(sorted(blocked))}. "
                "The events are kept; the reason stands beside the lane."
            )
        if database.up is None:
            return "starting", "The database has not been reached yet. Events are kept."
        return "healthy", f"Healthy: {waiting:,} events are waiting for their next load."


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
