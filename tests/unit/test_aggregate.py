"""Several processes as one, also while one of them is of release 1.0."""

from __future__ import annotations

import asyncio
import copy
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


async def test_of_each_part_the_process_that_is_worst_off_is_shown() -> None:
    async with testing.service() as service:
        own = await service.pipeline.status.for_peers()
    fine = {part["part"] for part in own["parts"] if part["lane"] is None}
    for name, changes in (("recovery", {"up": False, "error": "x"}), ("upkeep", {"slow": True})):
        other = copy.deepcopy(own)
        (part,) = [part for part in other["parts"] if part["part"] == name]
        part.update(changes)
        for status in (together(own, [other]), together(other, [own])):
            shown = {part["part"]: part for part in status["parts"]}
            assert shown[name].items() >= changes.items()
            assert fine <= shown.keys()
            assert len(status["parts"]) == len(own["parts"])


async def test_readers_share_what_the_other_processes_are_asked() -> None:
    """One question is under way; what a reader sees was asked after it came."""
    async with testing.service() as service:
        status, asked, answer = service.pipeline.status, 0, asyncio.Event()

        async def ask(method: str, path: str) -> list[Any]:
            nonlocal asked
            asked += 1
            await answer.wait()
            return []

        status.peers.ask = ask  # type: ignore[method-assign]
        first = asyncio.create_task(status.refresh())
        await asyncio.sleep(0)
        others = [asyncio.create_task(status.refresh()) for _ in range(10)]
        await asyncio.sleep(0)
        others[0].cancel()
        answer.set()
        await asyncio.gather(first, *others[1:])
        assert asked == 2
        await status.refresh()
        assert asked == 3
