"""No copy of a segment is loaded twice, and the ledger forgets in the end: on a simulated clock.

The servers are real, so is what they redeliver; hours pass by the database's clock alone. Each case
is run a second time without what guards it, and must then double: or it would show nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from unittest import mock

import pytest

from datapipe.errors import SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors.nats import streams as streams_module
from datapipe.mirrors.nats.mirror import Nats, open_nats
from datapipe.mirrors.nats.prune import FENCE_S, SPREAD_S, Pruning
from datapipe.sinks import Table
from datapipe.sinks.memory import MemoryDatabase, MemorySink
from tests.jetstream import NatsCluster
from tests.mirror_nats import COLUMNS, Members, has, messages, segment, settings_of, store
from tests.service import until

TABLE = Table("install", COLUMNS)
NIGHT_S = 10 * 3600


class World:
    """A cluster, a database whose clock is ours, and processes that come and go."""

    def __init__(self, cluster: NatsCluster, prefix: str) -> None:
        self.cluster = cluster
        self.prefix = prefix
        self.now = 1_000_000.0
        self.database = MemoryDatabase()
        self.database.clock = lambda: self.now
        self._numbers = iter(range(100))

    @asynccontextmanager
    async def process(self) -> AsyncIterator[Process]:
        name = f"process{next(self._numbers)}"
        async with open_nats(settings_of(self.cluster, self.prefix), name) as mirror:
            process = Process(self, mirror, MemorySink(self.database, name))
            await mirror.recover(process)
            yield process

    @property
    def rows(self) -> int:
        return len(self.database.lines["install"])

    @property
    def known(self) -> int:
        return len(self.database.ledger)

    async def is_empty(self) -> bool:
        return await has(self.cluster, self.prefix, 0)


class Process(Members):
    """What one does of all that: by hand, so that it can stop anywhere."""

    def __init__(self, world: World, mirror: Nats, sink: MemorySink) -> None:
        super().__init__(clock=lambda: world.now)
        self.mirror = mirror
        self._world = world
        self._sink = sink

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        await self._sink.expire_lanes(source, before)

    async def take(self) -> tuple[list[Segment], float]:
        """What can be taken, and until when it may be entered into the ledger."""
        fence_s = self.mirror.traits.fence_s
        assert fence_s is not None
        not_after = self._world.now + fence_s
        taken: list[Segment] = []
        async with asyncio.timeout(10):
            while not taken:
                taken = await self.mirror.take("install", 1_000_000)
        return taken, not_after

    async def load(self, segments: Sequence[Segment], not_after: float) -> None:
        await self._sink.load(TABLE, segments, not_after=not_after)

    async def pass_time(self, seconds: float) -> None:
        """It looks for what waits each minute."""
        for _ in range(math.ceil(seconds / 60)):
            self._world.now += 60
            await self.mirror.recover(self)

    def dies(self) -> None:
        """Its end says nothing to anybody."""
        self.mirror.settle = mock.AsyncMock()  # type: ignore[method-assign]


@pytest.fixture
def world(nats_node: NatsCluster, nats_prefix: str) -> Iterator[World]:
    with mock.patch.object(streams_module, "ACK_WAIT_S", 0.5):
        yield World(nats_node, nats_prefix)


def by_age_alone(pruning: Pruning, lane: str, now: float, first_seq: int, last_seq: int) -> float:
    """What `Pruning` is not."""
    return now - 2 * SPREAD_S


@pytest.fixture(params=[True, False], ids=["guarded", "by age alone"])
def guarded(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether rows are pruned as they should be."""
    if request.param:
        yield True
    else:
        with mock.patch.object(Pruning, "look", by_age_alone):
            yield False


@pytest.mark.parametrize("fenced", [True, False])
async def test_a_process_that_slept_loads_nothing_that_others_have(
    world: World, fenced: bool
) -> None:
    async with world.process() as sleeper, world.process() as other:
        await store(sleeper.mirror, segment(1))
        slept_on, not_after = await sleeper.take()
        taken, in_time = await other.take()  # once ack_wait is over
        await other.load(taken, in_time)
        await other.mirror.remove(taken)
        await until(world.is_empty)
        assert (world.rows, world.known) == (1, 1)
        await other.pass_time(3600)
        assert world.known == 0  # it is forgotten: nobody holds it, but for the sleeper
        if fenced:
            with pytest.raises(SinkUnavailable, match="held for too long"):
                await sleeper.load(slept_on, not_after)
        else:
            await sleeper.load(slept_on, math.inf)
        assert world.rows == (1 if fenced else 2)


async def test_a_process_that_slept_less_long_finds_it_in_the_ledger(world: World) -> None:
    """The ledger keeps a row for longer than the fence lets anybody in."""
    async with world.process() as sleeper, world.process() as other:
        await store(sleeper.mirror, segment(1))
        slept_on, not_after = await sleeper.take()
        taken, in_time = await other.take()
        await other.load(taken, in_time)
        await other.mirror.remove(taken)
        await until(world.is_empty)
        await other.pass_time(FENCE_S - 60)
        assert world.now < not_after
        await sleeper.load(slept_on, not_after)
        assert world.rows == 1


async def test_a_copy_that_comes_back_after_days_is_known(world: World, guarded: bool) -> None:
    """It was stored twice: its append was repeated, and the duplicate window was over."""
    with mock.patch.object(streams_module, "_DUPLICATE_WINDOW_S", 0.1):
        async with world.process() as process:
            twice = segment(1)
            await store(process.mirror, twice)
            await asyncio.sleep(0.3)
            await store(process.mirror, twice)
            assert await messages(world.cluster, world.prefix) == 2
            taken, not_after = await process.take()
            assert len(taken) == 1
            await process.load(taken, not_after)
            await process.mirror.remove(taken)
            await process.pass_time(NIGHT_S)  # and nobody takes the other one
            assert world.known == (1 if guarded else 0)
            taken, not_after = await process.take()
            await process.load(taken, not_after)
            await process.mirror.remove(taken)
            assert world.rows == (1 if guarded else 2)
            await until(world.is_empty)
            await process.pass_time(2 * 3600)
            assert world.known == 0


async def test_all_stopped_between_commit_and_ack_and_started_a_night_later(
    world: World, guarded: bool
) -> None:
    async with world.process() as last:
        await store(last.mirror, segment(1), segment(2))
        taken, not_after = await last.take()
        await last.load(taken, not_after)
        last.dies()
    assert world.rows == 2
    world.now += NIGHT_S
    async with world.process() as first:
        await first.pass_time(3600)  # say, it is too busy to load
        again, not_after = await first.take()
        await first.load(again, not_after)
        await first.mirror.remove(again)
        assert world.rows == (2 if guarded else 4)
        await until(world.is_empty)
        await first.pass_time(2 * 3600)
        assert world.known == 0


async def test_the_ledger_forgets_while_events_come_and_go(world: World) -> None:
    """What is known is what was loaded in the last hour or so, and it is not a row too few."""
    async with world.process() as process:
        most = 0
        for minute in range(6 * 60):
            await store(process.mirror, segment(minute))
            taken, not_after = await process.take()
            await process.load(taken, not_after)
            await process.mirror.remove(taken)
            await process.pass_time(60)
            most = max(most, world.known)
        assert world.rows == 6 * 60
        assert SPREAD_S / 60 < most < 60
