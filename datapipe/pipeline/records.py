"""What happened last, in bounded memory: loads, and refusals at the door."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from datapipe.monitor.formats import now

LOADS = 12
REFUSALS = 20
BODY_SHOWN = 300  # characters of a refused body


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
        events: how many of its events were refused; of the first tell `message` and `body`.
    """

    reason: str
    status_code: int
    message: str
    request_id: str
    events: int = 1
    body: str = ""
    at: str = field(default_factory=now)


class Recent:
    """The last loads and the last refusals, newest first."""

    def __init__(self) -> None:
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
        """Refusals for want of room come by the thousand and differ in nothing: one entry."""
        last = self._refusals[0] if self._refusals else None
        if last is not None and refusal.reason == "busy" and last.message == refusal.message:
            refusal.events += last.events
            self._refusals.popleft()
        self._refusals.appendleft(refusal)

    def loads(self) -> list[dict[str, Any]]:
        return [asdict(load) for load in self._loads]

    def refusals(self) -> list[dict[str, Any]]:
        return [asdict(refusal) for refusal in self._refusals]


def shown(body: bytes) -> str:
    """The beginning of a body, as text: for people, so what is not UTF-8 is marked."""
    text = body[: BODY_SHOWN * 4].decode(errors="replace")
    return text if len(text) <= BODY_SHOWN else f"{text[:BODY_SHOWN]}…"
