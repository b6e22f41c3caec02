"""Books as they are where machines share a mirror, shown by a service that has one of its own."""

from __future__ import annotations

from typing import Any

from datapipe.monitor.status import Status
from datapipe.pipeline.lane import Lane


def share(status: Status, *, returned: int = 2) -> None:
    """From now on this service shows that its mirror is shared, and that 1,000 more wait there."""
    own_lane, own_mirror = status._lane, status._mirror

    def shared_lane(lane: Lane) -> dict[str, Any]:
        shown = own_lane(lane)
        shown |= {"returned": returned, "in_hand": shown["in_memory"]}
        shown["taken"] = sum(shown[key] for key in ("loaded", "duplicate", "dead", "in_hand"))
        shown["taken"] += returned
        shown["waiting"] += 1000
        return shown

    def shared_mirror() -> dict[str, Any]:
        return own_mirror() | {"kind": "nats", "shared": True, "fullest": 0.25}

    status._lane = shared_lane  # type: ignore[method-assign]
    status._mirror = shared_mirror  # type: ignore[method-assign]
