"""What every mirror must do; each implementation is a parameter of the one suite."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from datapipe.events.segment import SEGMENT_OVERHEAD_BYTES, Part, Segment
from datapipe.events.types import Column
from datapipe.mirrors import Mirror, Run, open_mirror
from datapipe.settings import Settings
from tests.doubles.ironmq import IronMQ

COLUMNS = (Column("user_id", "bigint"), Column("received_at", "timestamptz"))


def segment(number: int, lane: str = "install", size: int = 20) -> Segment:
    data = f"{number:0{size - 1}}\n".encode()
    parts = (Part("claim", "body", number, 0, size, 1),) if number % 2 else ()
    return Segment(lane, COLUMNS, data, 1, parts)


class Alone:
    """Neighbours of a process whose predecessors are all dead: `ended` lists them, or says all."""

    def __init__(self, ended: set[str]) -> None:
        self._ended = ended

    def silent(self, process: str) -> bool:
        return process in self._ended

    def loads(self, lane: str) -> bool:
        return True

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        return set()


class World:
    """One mirror service, which several processes open one after the other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ended: set[str] = set()
        self._stacks: list[tuple[str, AsyncExitStack]] = []

    async def open(self) -> Mirror:
        stack, process = AsyncExitStack(), f"process{len(self._stacks) + len(self.ended)}"
        self._stacks.append((process, stack))
        return await stack.enter_async_context(open_mirror(self.settings, process))

    async def recover(self, mirror: Mirror) -> tuple[list[Run], list[Segment]]:
        """What a recovery finds: runs to be read, or segments."""
        found = await mirror.recover(Alone(self.ended))
        return found.runs, found.segments

    async def end(self) -> None:
        """The process that opened it last is gone."""
        process, stack = self._stacks.pop()
        self.ended.add(process)
        await stack.aclose()

    async def end_all(self) -> None:
        while self._stacks:
            await self.end()


@pytest.fixture(params=["journal", "ironmq", "none"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with IronMQ() as service:
        made = World(
            Settings(
                mirror=request.param, data_dir=str(tmp_path), ironmq_host=service.host,
                ironmq_project_id=service.project_id, ironmq_token=service.token,
            )
        )  # fmt: skip
        yield made
        await made.end_all()


def durable(world: World) -> bool:
    return world.settings.mirror != "none"


def same(found: Segment, stored: Segment) -> bool:
    names = ("id", "lane", "data", "events", "columns", "parts", "created_at")
    return all(getattr(found, name) == getattr(stored, name) for name in names)


async def read_all(mirror: Mirror, run: Run, max_bytes: int = 1_000_000) -> list[Segment]:
    found: list[Segment] = []
    while run.after < run.until:
        segments = await mirror.read(run, max_bytes)
        assert segments
        found += segments
        run.after = segments[-1].position
    return found


async def test_positions_rise(world: World) -> None:
    mirror = await world.open()
    segments = [segment(n) for n in range(3)]
    await mirror.append(segments)
    more = segment(3)
    await mirror.append([more])
    positions = [each.position for each in (*segments, more)]
    assert positions == sorted(set(positions))
    assert all(each.source for each in segments)


async def test_a_position_never_comes_back(world: World) -> None:
    """Who still means what stood there would read, or remove, what it does not know."""
    mirror = await world.open()
    last = 0
    for number in range(3):
        stored = segment(number)
        await mirror.append([stored])
        assert stored.position > last
        last = stored.position
        await mirror.remove([stored])
        if world.settings.mirror == "journal":  # positions of the others are a process's own
            await world.end()
            mirror = await world.open()


async def test_what_was_stored_is_recovered_by_the_next_process(world: World) -> None:
    mirror = await world.open()
    assert await world.recover(mirror) == ([], [])
    stored = [segment(n, lane) for n in range(4) for lane in ("install", "purchase")]
    await mirror.append(stored[:5])
    await mirror.append(stored[5:])
    await world.end()
    again = await world.open()
    runs, segments = await world.recover(again)
    assert await world.recover(again) == ([], [])  # told once
    if not durable(world):
        assert (runs, segments) == ([], [])
        return
    for lane in ("install", "purchase"):
        wanted = [each for each in stored if each.lane == lane]
        found = [each for each in segments if each.lane == lane]
        for run in (each for each in runs if each.lane == lane):
            assert (run.segments, run.events) == (4, 4)
            assert run.bytes == sum(len(each.data) for each in wanted)
            assert run.oldest <= wanted[0].created_at
            found += await read_all(again, run)
        assert all(same(f, w) for f, w in zip(found, wanted, strict=True))


async def test_what_was_removed_does_not_come_back(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n) for n in range(6)]
    await mirror.append(stored)
    await mirror.remove(stored[:2])
    await mirror.remove(stored[:3])  # a repeat is harmless
    await world.end()
    again = await world.open()
    runs, segments = await world.recover(again)
    found = segments
    for run in runs:
        found += await read_all(again, run)
    left = stored[3:] if durable(world) else []
    assert [each.id for each in found] == [each.id for each in left]
    await again.remove(found)
    await world.end()
    assert await world.recover(await world.open()) == ([], [])


async def test_reading_is_bounded_and_goes_on_from_a_position(world: World) -> None:
    mirror = await world.open()
    if not mirror.parks:
        assert await mirror.read(Run("install", "", 0, 9, 9, 9, 9, 0.0), 1) == []
        return
    stored = [segment(n, size=5000) for n in range(10)]
    await mirror.append(stored)
    first, last = stored[0].position, stored[-1].position
    run = Run("install", stored[0].source, first, last, 9, 9, 45_000, 0.0)
    room = 2 * (5000 + SEGMENT_OVERHEAD_BYTES) + 50  # what it takes in memory may be counted
    two = await mirror.read(run, room)
    assert [each.id for each in two] == [each.id for each in stored[1:3]]
    single = await mirror.read(run, 1)  # one at least, however large
    assert [each.id for each in single] == [stored[1].id]
    assert [each.id for each in await read_all(mirror, run, room)] == [s.id for s in stored[1:]]


async def test_the_state_tells_what_is_held(world: World) -> None:
    mirror = await world.open()
    before = mirror.state()
    assert (before.kind, before.up, before.error) == (world.settings.mirror, True, None)
    stored = [
        Segment("install", COLUMNS, os.urandom(10_000).hex().encode() + b"\n", 1) for _ in range(8)
    ]
    await mirror.append(stored)
    assert mirror.state().bytes >= before.bytes + 80_000  # 20,000 each; random hex packs by half
    await mirror.remove(stored)
    assert mirror.state().bytes < before.bytes + 80_000


async def test_two_living_processes_leave_each_other_alone(world: World) -> None:
    one, two = await world.open(), await world.open()
    await one.append([segment(1)])
    await two.append([segment(2)])
    found = await asyncio.gather(world.recover(one), world.recover(two))
    assert found == [([], []), ([], [])]
    await world.end()  # `two` is gone
    runs, segments = await world.recover(one)
    assert len(runs) + len(segments) == (1 if durable(world) else 0)
