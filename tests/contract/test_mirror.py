"""What every mirror must do; each implementation is a parameter of the one suite.

Most of it holds for all of them. Where it matters whose a stored segment is, there are two claims:
in a mirror of one's own it is the process's, until that is dead; in a shared one it is anybody's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from unittest import mock

import pytest

from datapipe.errors import MirrorFull
from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column
from datapipe.mirrors import Mirror, Recovery, open_mirror
from datapipe.mirrors.nats import streams
from datapipe.settings import Settings
from datapipe.sinks import Mark
from tests.doubles.ironmq import IronMQ
from tests.jetstream import NatsCluster

COLUMNS = (Column("user_id", "bigint"), Column("received_at", "timestamptz"))
LANES = ("install", "purchase")

OWN = ["journal", "ironmq", "none", "toy"]  # `toy` is a third party's, in a package of its own
SHARED = ["nats_node", "nats_cluster"]
of_ones_own = pytest.mark.parametrize("choice", OWN, indirect=True)
that_is_shared = pytest.mark.parametrize("choice", SHARED, indirect=True)


def segment(number: int, lane: str = "install", size: int = 20) -> Segment:
    data = f"{number:0{size - 1}}\n".encode()
    parts = (Part("claim", "body", number, 0, size, 1),) if number % 2 else ()
    return Segment(lane, COLUMNS, data, 1, parts, neutral=number % 3 > 0)


class Alone:
    """Membership of a process that knows who is dead: `ended`."""

    def __init__(self, ended: set[str]) -> None:
        self._ended = ended

    def is_dead(self, process: str) -> bool:
        return process in self._ended

    def can_load(self, lane: str) -> bool:
        return lane in LANES

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return set()

    async def expire_source(self, source: str) -> None:
        return

    async def expire_lane(self, lane: str, before: float) -> None:
        return

    async def database_time(self) -> float:
        return time.time()

    async def find_mark(self, prefix: str) -> Mark:
        return Mark("the one database")

    mark = find_mark

    async def confirm_mark(self, prefix: str, id: str) -> None:
        assert id == "the one database"


class World:
    """One mirror service, which several processes open one after the other."""

    def __init__(self, settings: Settings) -> None:
        self.kind = settings.mirror
        self.settings = settings
        self.ended: set[str] = set()
        self._stacks: list[tuple[str, AsyncExitStack]] = []

    async def open(self) -> Mirror:
        stack, process = AsyncExitStack(), f"process{len(self._stacks) + len(self.ended)}"
        self._stacks.append((process, stack))
        mirror = await stack.enter_async_context(open_mirror(self.settings, process))
        if mirror.traits.shared:  # whose database it is must be known before anything is taken
            await self.recover(mirror)
        return mirror

    async def recover(self, mirror: Mirror) -> Recovery:
        return await mirror.recover(Alone(self.ended))

    async def end(self) -> None:
        """The process that opened it last is gone."""
        process, stack = self._stacks.pop()
        self.ended.add(process)
        await stack.aclose()

    async def end_all(self) -> None:
        while self._stacks:
            await self.end()


@pytest.fixture(params=[*OWN, *SHARED])
def choice(request: pytest.FixtureRequest) -> dict[str, str]:
    """The settings that choose a mirror."""
    if request.param in OWN:
        return {"mirror": request.param}
    cluster: NatsCluster = request.getfixturevalue(request.param)
    return cluster.settings


@pytest.fixture
async def world(
    choice: dict[str, str], tmp_path: Path, toys: Path, nats_prefix: str
) -> AsyncIterator[World]:
    async with IronMQ() as service:
        settings = Settings(
            data_dir=str(tmp_path), ironmq_host=service.host,
            ironmq_project_id=service.project_id, ironmq_token=service.token,
            buffer_max_bytes=80_000, journal_max_bytes=1_000_000, ironmq_max_bytes=1_000_000,
            nats_prefix=nats_prefix, nats_lane_max_bytes=1_048_576, **choice,
        )  # fmt: skip
        made = World(settings)
        yield made
        await made.end_all()


def same(found: Segment, stored: Segment) -> bool:
    names = ("id", "lane", "data", "events", "columns", "parts", "created_at", "neutral")
    return all(getattr(found, name) == getattr(stored, name) for name in names)


async def store(mirror: Mirror, *segments: Segment) -> None:
    appended = await mirror.append(segments)
    assert appended.error is None
    assert [each.id for each in appended.stored] == [each.id for each in segments]


async def take_all(mirror: Mirror, lane: str = "install") -> list[Segment]:
    taken: list[Segment] = []
    async with asyncio.timeout(10):
        while True:
            some = await mirror.take(lane, 10_000_000)
            taken += some
            # who hands out what is shared may learn of the newest a little later
            if not some and not (mirror.traits.shared and mirror.waiting(lane).parked):
                return taken


def ids(segments: Sequence[Segment]) -> list[str]:
    return [each.id for each in segments]


async def test_what_was_stored_is_taken_in_order_lane_by_lane(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n, lane) for n in range(4) for lane in LANES]
    await store(mirror, *stored[:5])
    await store(mirror, *stored[5:])
    for lane in LANES:
        wanted = [each for each in stored if each.lane == lane]
        assert mirror.waiting(lane).events == 4
        taken = await take_all(mirror, lane)
        assert all(same(t, w) for t, w in zip(taken, wanted, strict=True))
        assert mirror.waiting(lane).events == 4  # until they are removed
        assert await mirror.take(lane, 1000) == []


async def test_taking_is_bounded_but_gives_one_at_least(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n, size=5000) for n in range(5)]
    await store(mirror, *stored)
    assert ids(await mirror.take("install", 12_000)) == ids(stored[:2])
    assert ids(await mirror.take("install", 1)) == ids(stored[2:3])
    assert ids(await take_all(mirror)) == ids(stored[3:])


async def test_what_was_requeued_comes_first(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n) for n in range(6)]
    await store(mirror, *stored)
    taken = await mirror.take("install", 60)
    mirror.requeue("install", taken, put_off=False)
    assert ids(await take_all(mirror)) == ids(stored)


async def test_a_position_never_comes_back(world: World) -> None:
    """Who still means what stood there would read, or remove, what it does not know."""
    mirror = await world.open()
    last = 0
    for number in range(3):
        await store(mirror, segment(number))
        (taken,) = await take_all(mirror)
        assert taken.position > last
        last = taken.position
        await mirror.remove([taken])
        if world.kind in ("journal", "nats"):  # positions of the others are a process's own
            await world.end()
            mirror = await world.open()


@of_ones_own
async def test_what_was_stored_is_recovered_by_the_next_process(world: World) -> None:
    mirror = await world.open()
    durable = mirror.traits.durable
    assert (await world.recover(mirror)).lanes == {}
    stored = [segment(n, lane) for n in range(4) for lane in LANES]
    await store(mirror, *stored)
    await world.end()
    again = await world.open()
    found = await world.recover(again)
    assert {name: came.events for name, came in found.lanes.items()} == (
        dict.fromkeys(LANES, 4) if durable else {}
    )
    assert (await world.recover(again)).lanes == {}  # once
    for lane in LANES:
        wanted = [each for each in stored if each.lane == lane and durable]
        waiting = again.waiting(lane)
        assert waiting.events == len(wanted)
        assert waiting.bytes == sum(len(each.data) for each in wanted)
        assert not durable or (waiting.oldest or 0.0) <= wanted[0].created_at
        taken = await take_all(again, lane)
        assert all(same(t, w) for t, w in zip(taken, wanted, strict=True))


@that_is_shared
async def test_what_was_stored_waits_for_all(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n, lane) for n in range(4) for lane in LANES]
    await store(mirror, *stored)
    await world.end()
    with mock.patch.object(world, "recover"):  # by hand
        again = await world.open()
    found = await world.recover(again)
    assert (found.lanes, found.due) == ({}, set(LANES))
    assert (await world.recover(again)).due == set()  # once
    for lane in LANES:
        wanted = [each for each in stored if each.lane == lane]
        waiting = again.waiting(lane)
        assert (waiting.events, waiting.in_memory, waiting.parked) == (4, 0, 4)
        assert waiting.bytes >= sum(len(each.data) for each in wanted)
        assert abs((waiting.oldest or 0.0) - wanted[0].created_at) < 5  # by the servers' clock
        taken = await take_all(again, lane)
        assert all(same(t, w) for t, w in zip(taken, wanted, strict=True))
        assert (waiting.events, waiting.in_memory, waiting.parked) == (4, 4, 0)


async def test_what_was_removed_does_not_come_back(world: World) -> None:
    mirror = await world.open()
    durable = mirror.traits.durable
    stored = [segment(n) for n in range(6)]
    await store(mirror, *stored)
    taken = await take_all(mirror)
    await mirror.remove(taken[:2])
    await mirror.remove(taken[:3])  # a repeat is harmless
    assert mirror.waiting("install").events == 3
    await world.end()
    again = await world.open()
    await world.recover(again)
    left = await take_all(again)
    assert ids(left) == (ids(stored[3:]) if durable else [])
    await again.remove(left)
    await world.end()
    last = await world.open()
    assert (await world.recover(last)).lanes == {}
    assert await last.take("install", 1000) == []


@of_ones_own
async def test_what_does_not_fit_into_memory_is_read_back_in_order(world: World) -> None:
    mirror = await world.open()
    if not mirror.traits.durable:
        await store(mirror, *[segment(n, size=5000) for n in range(20)])
        assert mirror.state().full  # its owner refuses more
        return
    stored = [segment(n, size=5000) for n in range(40)]  # of 200,000 bytes, memory holds 80,000
    for each in stored:
        await store(mirror, each)
    waiting = mirror.waiting("install")
    assert waiting.parked > 20
    assert (waiting.events, waiting.bytes) == (40, 200_000)
    assert mirror.pressed
    taken: list[Segment] = []
    while some := await mirror.take("install", 15_000):
        assert sum(len(each.data) for each in some) <= 15_000
        taken += some
        await mirror.remove(some)
    assert ids(taken) == ids(stored)
    assert (waiting.events, waiting.bytes, waiting.oldest) == (0, 0, None)
    assert not mirror.pressed


@that_is_shared
async def test_memory_holds_what_is_taken_alone(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n, size=5000) for n in range(40)]
    await store(mirror, *stored)
    waiting = mirror.waiting("install")
    assert (waiting.in_memory, waiting.parked, waiting.events) == (0, 40, 40)
    assert mirror.pressed  # it would be, if memory had them
    taken: list[Segment] = []
    while some := await mirror.take("install", 15_000):
        assert sum(len(each.data) for each in some) <= 15_000
        assert waiting.in_memory == len(some)
        taken += some
        await mirror.remove(some)
    assert ids(taken) == ids(stored)
    assert (waiting.events, waiting.bytes, waiting.oldest) == (0, 0, None)
    async with asyncio.timeout(5):
        while mirror.pressed:
            await asyncio.sleep(0.05)


@of_ones_own
async def test_a_lane_that_is_put_off_holds_no_memory_until_it_loads(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n, size=5000) for n in range(6)]
    await store(mirror, *stored[:4])
    mirror.requeue("install", await mirror.take("install", 12_000), put_off=True)
    await store(mirror, *stored[4:])
    waiting = mirror.waiting("install")
    assert waiting.events == 6
    assert waiting.in_memory == (0 if mirror.traits.durable else 6)
    assert not mirror.pressed
    first = await mirror.take("install", 5000)
    await mirror.remove(first)
    assert ids([*first, *await take_all(mirror)]) == ids(stored)


@that_is_shared
async def test_a_lane_that_is_put_off_holds_nothing_and_is_left_to_others(world: World) -> None:
    mirror, other = await world.open(), await world.open()
    stored = [segment(n, size=5000) for n in range(6)]
    await store(mirror, *stored)
    mirror.requeue("install", await mirror.take("install", 12_000), put_off=True)
    assert mirror.waiting("install").in_memory == 0
    assert not mirror.pressed
    taken: list[Segment] = []
    async with asyncio.timeout(10):
        while len(taken) < len(stored):  # the first two once their delay is over
            taken += await other.take("install", 1_000_000)
    assert sorted(ids(taken)) == sorted(ids(stored))


@of_ones_own
async def test_lanes_that_are_put_off_may_fill_half_of_the_mirror(world: World) -> None:
    mirror = await world.open()
    tenth = mirror.state().max_bytes // 10
    mirror.requeue("install", (), put_off=True)
    await store(mirror, *[segment(n, size=tenth) for n in range(4)])
    assert not mirror.full(LANES)
    await store(mirror, *[segment(n, size=tenth) for n in range(4, 6)])
    assert mirror.full(LANES).keys() == {"install"}
    await mirror.remove(await mirror.take("install", 1))  # it is loaded again
    assert not mirror.full(LANES)


@that_is_shared
async def test_a_lane_is_full_when_its_stream_is(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n, size=100_000) for n in range(11)]
    appended = await mirror.append(stored)
    assert isinstance(appended.error, MirrorFull)
    assert 9 <= len(appended.stored) < 11  # of 1 MiB
    assert mirror.full(LANES).keys() == {"install"}
    assert "nats_lane_max_bytes" in mirror.full(LANES)["install"]
    await store(mirror, segment(1, "purchase"))  # others go on
    await mirror.remove((await take_all(mirror))[:4])
    assert not mirror.full(LANES)
    async with asyncio.timeout(10):  # what is acknowledged makes room a little later
        while (await mirror.append([segment(12, size=100_000)])).error is not None:
            await asyncio.sleep(0.05)


async def test_the_state_tells_what_is_held(world: World) -> None:
    mirror = await world.open()
    before = mirror.state()
    assert (before.kind, before.up, before.error) == (world.kind, True, None)
    stored = [
        Segment("install", COLUMNS, os.urandom(3_000).hex().encode() + b"\n", 1) for _ in range(8)
    ]
    await store(mirror, *stored)
    assert mirror.state().bytes >= before.bytes + 24_000  # 6,000 each; random hex packs by half
    await mirror.remove(await take_all(mirror))
    assert mirror.state().bytes < before.bytes + 24_000


@of_ones_own
async def test_two_living_processes_leave_each_other_alone(world: World) -> None:
    one, two = await world.open(), await world.open()
    await store(one, segment(1))
    await store(two, segment(2))
    found = await asyncio.gather(world.recover(one), world.recover(two))
    assert [each.lanes for each in found] == [{}, {}]
    await world.end()  # `two` is gone
    came = (await world.recover(one)).lanes
    assert sum(each.events for each in came.values()) == (1 if one.traits.durable else 0)


@that_is_shared
async def test_what_one_stored_any_can_take_once(world: World) -> None:
    one, two = await world.open(), await world.open()
    stored = [segment(n) for n in range(40)]
    await store(one, *stored[:20])
    await store(two, *stored[20:])
    taken: list[Segment] = []
    while some := [*await one.take("install", 500), *await two.take("install", 500)]:
        taken += some
    assert sorted(ids(taken)) == sorted(ids(stored))
    assert one.waiting("install").in_memory + two.waiting("install").in_memory == 40


@that_is_shared
async def test_what_a_process_held_that_ended_can_be_taken_at_once(world: World) -> None:
    one, two = await world.open(), await world.open()
    stored = [segment(n) for n in range(6)]
    await store(one, *stored)
    await two.take("install", 10_000_000)
    assert await one.take("install", 10_000_000) == []
    await world.end()
    assert ids(await take_all(one)) == ids(stored)


@that_is_shared
async def test_what_a_process_held_that_was_killed_comes_back(world: World) -> None:
    with mock.patch.object(streams, "ACK_WAIT_S", 1.0):
        one, two = await world.open(), await world.open()
        stored = [segment(n) for n in range(6)]
        await store(one, *stored)
        await two.take("install", 10_000_000)
        with mock.patch.object(two, "settle"):
            await world.end()
        assert await one.take("install", 10_000_000) == []
        taken: list[Segment] = []
        async with asyncio.timeout(10):
            while len(taken) < len(stored):
                taken += await one.take("install", 10_000_000)
                await asyncio.sleep(0.05)
    assert sorted(ids(taken)) == sorted(ids(stored))


async def test_a_lane_that_is_not_registered_is_found_and_left(world: World) -> None:
    mirror = await world.open()
    durable = mirror.traits.durable
    await store(mirror, segment(1, "unknown"))
    await world.end()
    again = await world.open()
    found = await world.recover(again)
    assert found.unregistered | found.lanes.keys() == ({"unknown"} if durable else set())
    assert again.waiting("unknown").in_memory == 0


@of_ones_own
async def test_what_the_ledger_may_forget_is_given_once(world: World) -> None:
    mirror = await world.open()
    await store(mirror, segment(1))
    taken = await take_all(mirror)
    await mirror.remove(taken)
    comes_back = world.kind == "ironmq"  # until it expires
    assert mirror.expirable() == ([] if comes_back else ids(taken))
    assert mirror.expirable() == []


async def test_a_removal_goes_on_until_it_is_done() -> None:
    async with IronMQ() as service:
        world = World(
            Settings(
                mirror="ironmq", ironmq_host=service.host, ironmq_project_id=service.project_id,
                ironmq_token=service.token, mirror_timeout=0.2,
            )
        )  # fmt: skip
        mirror = await world.open()
        await store(mirror, segment(1))
        service.faults.rate("503", 1.0)
        removal = mirror.remove(await take_all(mirror))
        assert mirror.waiting("install").events == 0
        done, _ = await asyncio.wait([removal], timeout=0.5)
        assert not done
        service.faults.clear()
        await asyncio.wait_for(removal, 30)
        await world.end_all()
