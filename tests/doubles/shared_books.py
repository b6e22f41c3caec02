"""Books as they are where machines share a mirror, shown by a service that has one of its own."""

from __future__ import annotations

from typing import Any

from datapipe.monitor.status import Status


def share(status: Status, *, returned: int = 2) -> None:
    """From now on this service shows that its mirror is shared, and that 1,000 more wait there."""
    own = status._own

    def shared() -> dict[str, Any]:
        shown = own()
        shown["mirror"] |= {"kind": "nats", "shared": True, "fullest": 0.25}
        for lane in shown["lanes"].values():
            lane |= {"returned": returned, "in_hand": lane["in_memory"]}
            lane["taken"] = sum(lane[key] for key in ("loaded", "duplicate", "dead", "in_hand"))
            lane["taken"] += returned
            lane["waiting"] += 1000
        return shown

    status._own = shared  # type: ignore[method-assign]
