"""Lane: the books of one event type. They are counted here and nowhere else."""

from __future__ import annotations

import math
import time

from datapipe.health import Health
from datapipe.mirrors import Mirror


class Lane:
    """The counts of what entered one lane and what left it; `waiting` is counted by the mirror,
    independently, so that an imbalance shows.

    Attributes:
        accepted, recovered: events that came in. Of a shared mirror `recovered` stays 0.
        taken, returned: events that this process took from a shared mirror, and those of them that
            it requeued; else 0.
        loaded, duplicate, dead: events that left it for good.
        blocked: why a person must act before it can be loaded, or None.
        deferred: its last load failed, while others could be loaded.
        health: of its loads.
        awaited: segments for whose load a POST waits.
    """

    def __init__(self, name: str, mirror: Mirror) -> None:
        self.name = name
        self.blocked: str | None = None
        self.deferred = False
        self.health = Health("load", name)
        self.accepted = 0
        self.recovered = 0
        self.taken = self.returned = 0
        self.loaded = 0
        self.duplicate = 0
        self.dead = 0
        self.awaited = 0
        self.waiting = mirror.waiting(name)
        self._shared = mirror.traits.shared

    @property
    def stuck(self) -> bool:
        """It can't be loaded while others can."""
        return self.blocked is not None or self.deferred

    @property
    def total_out(self) -> int:
        """Events that left this lane for good."""
        return self.loaded + self.duplicate + self.dead

    @property
    def in_hand(self) -> int:
        """Events that are taken from a shared mirror, and neither loaded nor returned."""
        return self.waiting.in_memory if self._shared else 0

    @property
    def balanced(self) -> bool:
        if self._shared:  # any process loads what any has accepted
            return self.taken == self.total_out + self.returned + self.in_hand
        return self.accepted + self.recovered == self.total_out + self.waiting.events

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest event that waits."""
        oldest = self.waiting.oldest
        if oldest is None or oldest == -math.inf:  # none, or unknown
            return 0.0
        return max(0.0, time.time() - oldest)
