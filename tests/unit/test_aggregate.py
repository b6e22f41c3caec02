"""Several processes as one, also while one of them is of release 1.0."""

from __future__ import annotations

from typing import Any

import msgspec

from datapipe import testing
from datapipe.monitor.aggregate import together


async def test_a_process_of_1_0_is_counted_in() -> None:
    async with testing.service() as service:
        await service.post({"event_name": "install", "user_id": 1, "timestamp": 2})
        own = await service.pipeline.status.for_peers()
    old: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(own))
    for lane in old["lanes"].values():
        del lane["slow_load"]
    del old["mirror"]["left_messages"], old["mirror"]["left_seconds"]
    old["mirror"]["up"] = False  # so what it tells stands
    status = together(own, [old])
    assert status["processes"] == 2
    assert status["books"]["accepted"] == 2
    assert status["mirror"]["left_messages"] == 0
