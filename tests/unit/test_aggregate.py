"""Several processes as one, also while one of them is of release 1.0 or mirrors are shared."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from typing import Any

import msgspec

from datapipe import testing
from datapipe.monitor.aggregate import together, together_series
from datapipe.monitor.peers import Heard


async def test_a_process_of_1_0_is_counted_in() -> None:
    async with testing.service() as service:
        await service.post({"event_name": "install", "user_id": 1, "timestamp": 2})
        own = await service.pipeline.status.for_peers()
    old: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(own))
    for lane in old["lanes"].values():
        del lane["slow_load"], lane["taken"], lane["returned"], lane["in_hand"]
    del old["keys"]
    del old["mirror"]["left_messages"], old["mirror"]["left_seconds"]
    old["mirror"]["up"] = old["database"]["up"] = False  # so what it tells stands
    product = old["database"].pop("product")
    status = together(own, [old])
    assert (status["database"]["product"], status["database"]["up"]) == (product, False)
    assert status["processes"] == 2
    assert status["books"]["accepted"] == 2
    assert status["mirror"]["left_messages"] == 0


async def test_the_use_of_named_keys_is_added_up() -> None:
    async with testing.service() as service:
        own = await service.pipeline.status.for_peers()
    counted = {"accepted": 1, "rejected": 2, "limited": 3, "last_seen": "2026-11-26T09:00:00.000Z"}
    early = counted | {"last_seen": "2026-11-25T10:00:00.000Z"}
    never = dict.fromkeys(("accepted", "rejected", "limited"), 0) | {"last_seen": None}
    several = [own | {"keys": {"ios": each, "web": never}} for each in (early, counted, never)]
    status = together(several[0], [*several[1:], own | {"keys": {}}])
    both = {"accepted": 2, "rejected": 4, "limited": 6, "last_seen": counted["last_seen"]}
    assert status["keys"] == {"ios": both, "web": never}


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

        async def ask(method: str, path: str, query: Mapping[str, str]) -> Heard:
            nonlocal asked
            asked += 1
            await answer.wait()
            return Heard()

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


async def test_who_wants_the_charts_shares_no_question_without_them() -> None:
    async with testing.service() as service:
        status, answer, asked = service.pipeline.status, asyncio.Event(), []
        other = await status.for_peers()
        other["history"] = {"install": {"accepted": [1.0], "loaded": [2.0], "waiting": [3]}}

        async def ask(method: str, path: str, query: Mapping[str, str]) -> Heard:
            asked.append(dict(query))
            await answer.wait()
            return Heard([{key: other[key] for key in other if not query or key != "history"}])

        status.peers.ask = ask  # type: ignore[method-assign]
        bare = {"history": "no"}
        for wanted, questions in (
            ([False, False, True, False], [bare, bare, {}]),
            ([False, True, False], [bare, {}]),
            ([True, False, True], [{}, bare, {}]),
        ):
            readers = []
            for history in wanted:
                readers.append(asyncio.create_task(status.refresh(history=history)))
                await asyncio.sleep(0)
            answer.set()
            await asyncio.gather(*readers)
            assert asked == questions
            answer.clear()
            asked.clear()
        answer.set()
        await status.refresh(history=False)
        history = (await status.whole())["history"]
        assert history["lanes"]["install"] == other["history"]["install"]


def shared(own: Mapping[str, Any], **lane: Any) -> dict[str, Any]:
    """The snapshot of a process whose mirror is shared, with these numbers in its one lane."""
    of: dict[str, Any] = copy.deepcopy(dict(own))
    of["mirror"] |= {"kind": "nats", "shared": True, "bytes": 900, "max_bytes": 1000}
    of["lanes"] = {"install": of["lanes"]["install"] | lane}
    return of


async def test_what_waits_in_a_shared_mirror_is_not_added() -> None:
    """Each process counts all of it; what they took, loaded and hold is added."""
    async with testing.service() as service:
        await service.post({"event_name": "install", "user_id": 1, "timestamp": 2})
        own = await service.pipeline.status.for_peers()
    waits = {"waiting": 1000, "waiting_bytes": 5000, "oldest_seconds": 7.0, "full": True}
    one = shared(own, **waits, accepted=1200, taken=300, loaded=200, returned=50, in_hand=50,
                 in_memory=50, parked=950)  # fmt: skip
    later = waits | {"waiting": 990, "oldest_seconds": 8.0, "full": False}  # its look is newer
    two = shared(own, **later, accepted=30, taken=40, loaded=10, duplicate=10, dead=10, in_hand=10,
                 in_memory=10, parked=980)  # fmt: skip
    idle = shared(own, **waits, accepted=0, in_memory=0, parked=1000)
    status = together(one, [two, idle])
    lane = status["lanes"]["install"]
    assert {key: lane[key] for key in waits} == waits
    assert (lane["in_memory"], lane["parked"]) == (60, 940)
    books = {"accepted": 1230, "recovered": 0, "loaded": 210, "duplicate": 10, "dead": 10,
             "waiting": 1000, "taken": 340, "returned": 50, "in_hand": 60,
             "balanced": True}  # fmt: skip
    assert status["books"] == books
    assert lane.items() >= books.items()
    assert status["totals"]["waiting_bytes"] == 5000
    assert (status["mirror"]["bytes"], status["mirror"]["max_bytes"]) == (900, 1000)
    assert together(idle, [one, two])["books"] == books
    two["lanes"]["install"]["balanced"] = False
    assert not together(one, [two, idle])["books"]["balanced"]


async def test_a_lane_that_only_another_process_has_is_its_own() -> None:
    async with testing.service() as service:
        await service.post({"event_name": "install", "user_id": 1, "timestamp": 2})
        own = await service.pipeline.status.for_peers()
    one, two = shared(own, waiting=5), shared(own, waiting=5)
    two["lanes"]["purchase"] = two["lanes"]["install"] | {"waiting": 3}
    assert together(one, [two])["books"]["waiting"] == 8


def test_charts_of_a_shared_mirror_add_what_each_did_and_not_what_waits() -> None:
    old = {"install": {"accepted": [1.0, 2.0], "loaded": [0.0, 1.0], "waiting": [90, 40]}}
    new = {"install": {"accepted": [5.0], "loaded": [3.0], "waiting": [41]}}
    for both in ([old, new], [new, old]):
        series = together_series(both, shared=True)
        wanted = {"accepted": [1.0, 7.0], "loaded": [0.0, 4.0], "waiting": [90, 41]}
        assert series["lanes"]["install"] == series["total"] == wanted
    assert together_series([old, new], shared=False)["total"]["waiting"] == [90, 81]
    other = {"purchase": old["install"]}
    assert together_series([old, other], shared=True)["total"]["waiting"] == [180, 80]
