"""The buffer's books and totals, over a mirror that lies in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from datapipe.events.segment import Chunk, Segment
from datapipe.events.types import Column
from datapipe.mirrors import Found, MirrorState, Neighbours, Run
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.lane import Lane
from datapipe.settings import Settings

COLUMNS = (Column("a", "text"),)
MEMORY_BYTES = 4000  # three segments, with their overhead
MIRROR_BYTES = 3000


class Shelf:
    """A mirror that parks, and survives nothing."""

    parks = True
    reads_ahead = True
    forgets_for_good = True
    appends_at_once = 1
    segment_max_bytes = 1000
    gather_s = 0.0

    def __init__(self) -> None:
        self.kept: dict[int, Segment] = {}
        self.found: list[Run] = []

    def queue_of(self, lane: str) -> str:
        return lane

    async def append(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        for segment in segments:
            self.put(segment, "own")
        return segments

    def put(self, segment: Segment, source: str) -> None:
        segment.source, segment.position = source, len(self.kept) + 1
        self.kept[segment.position] = segment

    async def remove(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            segment.gone = True

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        read: list[Segment] = []
        for segment in self.kept.values():
            of_run = (segment.lane, segment.source) == (run.lane, run.source)
            if of_run and run.after < segment.position <= run.until and not segment.gone:
                if read and sum(each.bytes for each in [*read, segment]) > max_bytes:
                    break
                read.append(segment)
        return read

    async def recover(self, neighbours: Neighbours) -> Found:
        found, self.found = self.found, []
        return Found(found)

    def state(self) -> MirrorState:
        return MirrorState("shelf", True, None, 0, MIRROR_BYTES)


class World:
    """A buffer on a shelf, and what a loader may do to its lanes, one step at a time."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.lost = False
        mirror: Any = self.shelf
        settings = Settings(buffer_max_bytes=MEMORY_BYTES)
        self.buffer = Buffer(mirror, settings, lambda seconds: None)

    async def step(self, what: str, lane: Lane, size: int) -> None:
        if what == "append":
            await self.buffer.append([_chunk(lane.name, size)])
        elif what == "recover":
            self.shelf.put(_segment(lane.name, size), "theirs")
            last = len(self.shelf.kept)
            self.shelf.found = [Run(lane.name, "theirs", last - 1, last, 1, 1, size, 0.0)]
            neighbours: Any = None
            await self.buffer.recover(neighbours)
        elif what == "read ahead":
            await self.buffer.read_ahead(lane, size)
        elif what == "load":
            taken = await self.buffer.take(lane, size)
            self.buffer.loaded(lane, taken, len(taken), 0, 0)
        elif what == "fail":
            self.buffer.give_back(lane, await self.buffer.take(lane, size))
        elif what == "put off":
            lane.deferred = True
            self.buffer.park_all(lane)
        elif what == "put off while it loads":
            taken = await self.buffer.take(lane, size)
            lane.deferred = True
            self.buffer.park_all(lane)
            self.buffer.give_back(lane, taken)
        elif what == "block":
            lane.blocked = "why" if size % 2 else "another reason"
        elif what == "lose":
            self.lost = True
            for segment in self.shelf.kept.values():
                segment.gone |= segment.lane == lane.name
        else:
            lane.blocked, lane.deferred = None, False

    def check(self) -> None:
        """What is kept while segments come and go is what a sum over them gives."""
        lanes = self.buffer.lanes.values()
        held = [s for lane in lanes for s in lane.segments_in_memory.values()]
        assert self.buffer.memory_bytes == sum(segment.bytes for segment in held)
        waiting = Counter({False: 0, True: 0})
        for lane in lanes:
            rows = sum(len(segment.data) for segment in lane.segments_in_memory.values())
            waiting[lane.stuck] += rows + sum(run.bytes for run in lane.runs.values())
            assert lane.balanced or self.lost
        assert (self.buffer.totals.waiting, self.buffer.totals.stuck) == (
            waiting[False], waiting[True],
        )  # fmt: skip
        most = max(waiting[False], self.buffer.memory_bytes)
        assert self.buffer.pressed == (most * 2 >= MEMORY_BYTES)
        stuck = {lane.name for lane in lanes if lane.stuck}
        full = waiting[True] * 2 >= MIRROR_BYTES
        assert self.buffer.full([*self.buffer.lanes, "unheard of"]) == (stuck if full else set())


STEPS = [
    "append", "recover", "read ahead", "load", "fail", "put off", "put off while it loads", "block",
    "heal", "lose",
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(["append", *STEPS]), st.sampled_from("pq"), st.integers(2, 900)),
        max_size=40,
    )
)
def test_running_totals_are_what_lies_there(steps: list[tuple[str, str, int]]) -> None:
    async def run() -> None:
        world = World()
        for what, name, size in steps:
            await world.step(what, world.buffer.lane(name), size)
            world.check()
        await world.buffer.settle(1.0)

    asyncio.run(run())


def _chunk(lane: str, size: int) -> Chunk:
    return Chunk(lane, COLUMNS, b"x" * (size - 1) + b"\n", 1)


def _segment(lane: str, size: int) -> Segment:
    return Segment(lane, COLUMNS, b"x" * (size - 1) + b"\n", 1)
