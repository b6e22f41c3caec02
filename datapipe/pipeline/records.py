"""Records of what happened, in bounded memory: loads, refusals, rates; `monitor` shows them."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

LOADS = 12
REFUSALS = 20
BODY_SHOWN = 300  # characters of a refused body


def iso(at: float) -> str:
    """Unix time as ISO 8601, UTC, with milliseconds."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def now() -> str:
    return iso(time.time())


@dataclass(slots=True)
class Load:
    """One load; `error` is None if it committed.

    `tries` counts loads of a lane that failed in a row with the same error: they are one entry,
    or an outage would push out all that was loaded before it.
    """

    lane: str
    rows: int = 0
    duplicates: int = 0
    dead: int = 0
    seconds: float = 0.0
    error: str | None = None
    tries: int = 1
    at: str = field(default_factory=now)


@dataclass(slots=True)
class Refusal:
    """One POST that was refused, as a whole or in part; what its client's developer needs.

    Attributes:
        events: how many of its events were refused; `message` and `body` are of the first.
        trace_id, span_id: that the request came with, if any.
    """

    reason: str
    status_code: int
    message: str
    request_id: str
    events: int = 1
    body: str = ""
    trace_id: str | None = None
    span_id: str | None = None
    at: str = field(default_factory=now)


@dataclass(slots=True)
class KeyUse:
    """What was posted with the ingest keys of one name.

    Attributes:
        accepted, rejected: events; a whole body that was refused is one.
        limited: POSTs beyond the rate, of which no body was read.
        last_seen: when it was last used, or None; as rows hold times, which costs nothing.
    """

    accepted: int = 0
    rejected: int = 0
    limited: int = 0
    last_seen: str | None = None

    def shown(self) -> dict[str, Any]:
        seen = self.last_seen and f"{self.last_seen[:-3].replace(' ', 'T')}Z"
        return asdict(self) | {"last_seen": seen}


class Records:
    """The last loads and the last refusals, newest first.

    Attributes:
        rejected: events, or whole bodies, that were refused, by reason.
        keys: the use of named ingest keys, by name; of those that a reload took away, too.
    """

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        self.keys: dict[str, KeyUse] = {}
        self._loads: deque[Load] = deque(maxlen=LOADS)
        self._refusals: deque[Refusal] = deque(maxlen=REFUSALS)

    def loaded(self, load: Load) -> None:
        if load.error is not None:
            last = next((each for each in self._loads if each.lane == load.lane), None)
            if last is not None and last.error == load.error:
                load.tries += last.tries
                self._loads.remove(last)
        self._loads.appendleft(load)

    def refused(self, refusal: Refusal) -> None:
        """Refusals for lack of room, or beyond a rate, come by the thousand: they are one entry."""
        last = self._refusals[0] if self._refusals else None
        many = refusal.reason in ("busy", "rate_limited")
        if many and last is not None and last.message == refusal.message:
            refusal.events += last.events
            self._refusals.popleft()
        self._refusals.appendleft(refusal)

    def loads(self) -> list[dict[str, Any]]:
        return [asdict(load) for load in self._loads]

    def refusals(self) -> list[dict[str, Any]]:
        return [asdict(refusal) for refusal in self._refusals]


def shown(body: bytes) -> str:
    """The beginning of a body, as text for people: what is not UTF-8 is marked."""
    text = body[: BODY_SHOWN * 4].decode(errors="replace")
    return text if len(text) <= BODY_SHOWN else f"{text[:BODY_SHOWN]}…"


class Rate:
    """How fast a number grows, by readings that are taken every few seconds or more often."""

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._readings: deque[tuple[float, float]] = deque()  # time, number

    def take(self, number: float, now: float | None = None) -> None:
        """Note what the number is; `now` is of the monotonic clock."""
        now = time.monotonic() if now is None else now
        self._readings.append((now, number))
        while len(self._readings) > 2 and self._readings[1][0] <= now - self._window_s:
            self._readings.popleft()

    def per_second(self) -> float:
        """Over the window; negative if it fell, 0 if that is not known yet."""
        if len(self._readings) < 2:
            return 0.0
        (began, first), (ended, last) = self._readings[0], self._readings[-1]
        return (last - first) / (ended - began) if ended > began else 0.0
