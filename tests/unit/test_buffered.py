"""What a buffered mirror counts and gives, over a store that lies in memory."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.mirrors import Appended, Membership, MirrorState, Traits
from datapipe.mirrors.buffered import BufferedMirror
from datapipe.mirrors.store import Found, Removal, Run

COLUMNS = (Column("a", "text"),)
MEMORY_BYTES = 4000  # three segments, with their overhead
MIRROR_BYTES = 3000


class Shelf:
    """A store that parks, and survives nothing."""

    reads_ahead = True
    forgets_for_good = True
    traits = Traits(batch_bytes=1000, identity="shelf", recover_interval_s=1.0)

    def __init__(self) -> None:
        self.kept: dict[int, Segment] = {}
        self.found: list[Run] = []
        self.readable = asyncio.Event()
        self.readable.set()

    async def append(self, segments: Sequence[Segment]) -> Appended:
        for segment in segments:
            self.put(segment, "own")
        return Appended(segments)

    def put(self, segment: Segment, source: str) -> None:
        segment.source, segment.position = source, len(self.kept) + 1
        self.kept[segment.position] = segment

    async def remove(self, removals: Sequence[Removal]) -> None:
        for removal in removals:
            self.kept[removal.position].missing = True

    async def read(self, run: Run, max_bytes: int) -> list[Segment]:
        after, until = run.after, run.until
        await self.readable.wait()
        read: list[Segment] = []
        for segment in self.kept.values():
            of_run = (segment.lane, segment.source) == (run.lane, run.source)
            if of_run and after < segment.position <= until and not segment.missing:
                if read and sum(each.bytes for each in [*read, segment]) > max_bytes:
                    break
                read.append(segment)
        return read

    async def recover(self, membership: Membership) -> Found:
        found, self.found = self.found, []
        return Found(runs=found)

    async def keep(self, membership: Membership) -> bool:
        return False

    async def release(self) -> None:
        return

    def state(self) -> MirrorState:
        return MirrorState("shelf", True, None, 0, MIRROR_BYTES)


class Alone:
    """Membership of who can load everything that is not put off."""

    def __init__(self) -> None:
        self.put_off: set[str] = set()

    def can_load(self, lane: str) -> bool:
        return lane not in self.put_off


class World:
    """A mirror on a shelf, what a loader may do to it step by step, and what must be there."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.mirror = BufferedMirror(self.shelf, MEMORY_BYTES)
        self.alone = Alone()
        self.waiting: dict[str, list[Segment]] = {"p": [], "q": []}
        self.lost = False

    async def step(self, what: str, lane: str, size: int) -> None:
        if what == "append":
            segment = _segment(lane, size)
            await self.mirror.append([segment])
            self.waiting[lane].append(segment)
        elif what == "recover":
            segment = _segment(lane, size)
            self.shelf.put(segment, "theirs")
            last = len(self.shelf.kept)
            self.shelf.found = [Run(lane, "theirs", last - 1, last, 1, 1, size, 0.0)]
            membership: Any = self.alone
            await self.mirror.recover(membership)
            self.waiting[lane].append(segment)
        elif what == "load":
            taken = await self.mirror.take(lane, size)
            self.mirror.remove(taken)
            if taken:
                self.alone.put_off.discard(lane)
            self.waiting[lane] = [each for each in self.waiting[lane] if each not in taken]
        elif what == "fail":
            self._requeue(lane, await self.mirror.take(lane, size), put_off=False)
        elif what == "put off":
            self._requeue(lane, await self.mirror.take(lane, size), put_off=True)
        elif what == "put off while more is read":
            self.shelf.readable.clear()
            reading = asyncio.create_task(self.mirror.take(lane, size))
            await asyncio.sleep(0)
            self._requeue(lane, (), put_off=True)
            self.shelf.readable.set()
            self._requeue(lane, await reading, put_off=True)
        elif what == "put off while it reads ahead":
            taken = await self.mirror.take(lane, size)
            self.shelf.readable.clear()
            await asyncio.sleep(0)  # now it reads
            self._requeue(lane, taken, put_off=True)
            self.shelf.readable.set()
        elif what == "lose":
            self.lost = True
            for segment in self.shelf.kept.values():
                segment.missing |= segment.lane == lane

    def _requeue(self, lane: str, segments: Sequence[Segment], *, put_off: bool) -> None:
        self.mirror.requeue(lane, segments, put_off=put_off)
        if put_off:
            self.alone.put_off.add(lane)
        else:
            self.alone.put_off.discard(lane)

    def check(self) -> None:
        """What is kept while segments come and go is what a sum over them gives."""
        lanes = {name: self.mirror._lane(name) for name in self.waiting}
        held = [segment for lane in lanes.values() for segment in lane.held.values()]
        assert self.mirror.memory_bytes == sum(segment.bytes for segment in held)
        able = off = 0
        for name, lane in lanes.items():
            rows = sum(len(segment.data) for segment in lane.held.values())
            rows += sum(run.bytes for run in lane.runs.values())
            assert lane.bytes == rows
            if not self.lost:
                assert lane.events == len(self.waiting[name])
            if name in self.alone.put_off:
                off += rows
                assert not lane.in_memory or lane.ahead is not None
            else:
                able += rows
        most = max(able, self.mirror.memory_bytes)
        assert self.mirror.pressed == (most * 2 >= MEMORY_BYTES)
        full = self.alone.put_off if off * 2 >= MIRROR_BYTES else set()
        assert self.mirror.full([*lanes, "unheard of"]).keys() == full


STEPS = [
    "append", "recover", "load", "fail", "put off", "put off while more is read",
    "put off while it reads ahead", "lose",
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(["append", *STEPS]), st.sampled_from("pq"), st.integers(2, 900)),
        max_size=40,
    )
)
def test_what_is_counted_and_given_is_what_lies_there(steps: list[tuple[str, str, int]]) -> None:
    async def run() -> None:
        world = World()
        for what, name, size in steps:
            await world.step(what, name, size)
            world.check()
        for name, waiting in world.waiting.items():
            taken: list[Segment] = []
            while some := await world.mirror.take(name, 1_000_000):
                taken += some
            if not world.lost:
                assert {each.id for each in taken} == {each.id for each in waiting}
                assert len(taken) == len(waiting)
        await world.mirror.settle(1.0)

    asyncio.run(run())


def _segment(lane: str, size: int) -> Segment:
    return Segment(lane, COLUMNS, b"x" * (size - 1) + b"\n", 1)


async def test_what_the_store_has_lost_sight_of_leaves_nothing_behind() -> None:
    """It is given without its rows, and no byte of it is counted once it is gone."""
    shelf = Shelf()
    mirror = BufferedMirror(shelf, 0)
    await mirror.append([_segment("p", 500)])
    (kept,) = shelf.kept.values()
    lost = Segment("p", (), b"", 1, id=kept.id, source=kept.source, position=kept.position)
    lost.missing = True
    shelf.kept = {kept.position: lost}

    async def read(run: Run, max_bytes: int) -> list[Segment]:
        return [lost]

    shelf.read = read  # type: ignore[method-assign]
    (taken,) = await mirror.take("p", 1000)
    await mirror.remove([taken])
    waiting = mirror.waiting("p")
    assert (waiting.events, waiting.bytes, mirror.memory_bytes) == (0, 0, 0)


class Broken(Shelf):
    """A shelf from which nothing can be removed, for this reason."""

    def __init__(self, why: Exception) -> None:
        super().__init__()
        self.why: Exception | None = why

    def put(self, segment: Segment, source: str) -> None:
        segment.source, segment.position = source, 1  # and it holds no rows

    async def remove(self, removals: Sequence[Removal]) -> None:
        if self.why is not None:
            raise self.why


async def test_removals_that_fail_for_long_hold_no_rows() -> None:
    shelf = Broken(MirrorUnavailable("away"))
    mirror = BufferedMirror(shelf, 1_000_000)
    removals = []
    for _ in range(5):
        await mirror.append([_segment("only here", 1000) for _ in range(100)])
        removals.append(mirror.remove(await mirror.take("only here", 1_000_000)))
    await asyncio.sleep(0.01)
    assert not any(removal.done() for removal in removals)
    gc.collect()
    rows = [each for each in gc.get_objects() if isinstance(each, Segment)]
    assert not [each for each in rows if each.lane == "only here"]
    assert mirror.memory_bytes == 0
    shelf.why = None
    await asyncio.wait_for(asyncio.gather(*removals), 5)
    assert len(mirror.expirable()) == 500


async def test_a_removal_that_dies_is_logged_and_holds_up_no_stop() -> None:
    """What it leaves in the mirror comes back: the ledger must know it."""
    mirror = BufferedMirror(Broken(RuntimeError("not foreseen")), 1_000_000)
    await mirror.append([_segment("p", 100)])
    with capture_logs() as lines:
        mirror.remove(await mirror.take("p", 1000))
        await asyncio.wait_for(mirror.settle(30.0), 5)
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("background task died", "critical")
    assert mirror.expirable() == []
