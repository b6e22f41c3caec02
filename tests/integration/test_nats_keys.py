"""Idempotency keys are kept by what waits in the cluster: each process tells its age by heartbeat.

What the database makes of that is in tests/contract/test_sink.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.events.registry import load_registry
from datapipe.mirrors.nats import streams as streams_module
from datapipe.mirrors.nats.mirror import Nats, open_nats
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.coordinator import Coordinator
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Records
from datapipe.sinks import Beat, Heartbeat, Mark
from datapipe.sinks.memory import MemoryDatabase, MemorySink
from tests.jetstream import NatsCluster
from tests.mirror_nats import Members, Tap, keyed, opened, settings_of, store, take_until


class Sink(MemorySink):
    """Attributes: oldest_s: of the last heartbeat."""

    oldest_s: float | None = None

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Beat]:
        self.oldest_s = beat.oldest_s
        return await super().heartbeat(beat)


class Process:
    """A service without a port, whose steps are made by hand."""

    def __init__(self, mirror: Nats, settings: Any) -> None:
        registry = load_registry(settings)
        self.mirror = mirror
        self.sink = Sink(MemoryDatabase(), "process")
        buffer = Buffer(mirror, settings, lambda seconds: None, lambda exc: None)
        loader = Loader(buffer, self.sink, registry, settings, Records(), lambda seconds: None)
        self.coordinator = Coordinator(buffer, loader, self.sink, "process", [])

    async def looks(self) -> None:
        async for _ in self.coordinator.looks():
            break

    async def oldest_s(self) -> float | None:
        await self.coordinator.heartbeat()
        return self.sink.oldest_s


@asynccontextmanager
async def running(cluster: NatsCluster, prefix: str, **more: Any) -> AsyncIterator[Process]:
    settings = settings_of(cluster, prefix, **more)
    async with open_nats(settings, "process") as mirror:
        yield Process(mirror, settings)


@pytest.mark.parametrize("lane", ["install", "not_registered"])
async def test_what_waits_in_any_lane_keeps_keys(
    nats_cluster: NatsCluster, nats_prefix: str, lane: str
) -> None:
    async with (
        opened(nats_cluster, nats_prefix, "another") as another,
        running(nats_cluster, nats_prefix) as process,
    ):
        process.sink._database.marks[nats_prefix] = Mark("one")  # as the other one's
        await store(another, keyed(2, 1000, lane))
        stored = time.time()
        await asyncio.sleep(1.2)
        await process.looks()
        age_s = await process.oldest_s()
        assert age_s is not None
        assert time.time() - stored - 0.5 < age_s < 10
        taken = await take_until(another, 1, lane)
        await process.mirror.keep(Members())
        assert (await process.oldest_s() or 0.0) > age_s  # somebody has it: it waits all the same
        await another.remove(taken)

        async with asyncio.timeout(10):
            while await process.oldest_s() is not None:
                await process.mirror.keep(Members())
                await asyncio.sleep(0.1)


async def test_as_long_as_a_stream_is_not_seen_all_keys_are_kept(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with (
        Tap(nats_node.nodes[0].url).running() as tap,
        running(nats_node, nats_prefix, nats_url=tap.url) as process,
    ):
        tap.answers.clear()
        with pytest.raises(MirrorUnavailable):
            await process.looks()
        assert await process.oldest_s() == math.inf
        tap.answers.set()
        await process.looks()
        assert await process.oldest_s() is None
        with mock.patch.object(streams_module, "_UNKNOWN_S", 0.5):
            look_at = process.mirror.streams.look_at

            async def not_installs(stream: streams_module.Stream, timeout_s: float = 2.0) -> None:
                if stream.lane == "install":
                    raise MirrorUnavailable("its leader is away")
                await look_at(stream, timeout_s)

            await asyncio.sleep(0.6)
            with mock.patch.object(process.mirror.streams, "look_at", not_installs):
                await process.mirror.keep(Members())
                assert await process.oldest_s() == math.inf
            await process.mirror.keep(Members())
            assert await process.oldest_s() is None
