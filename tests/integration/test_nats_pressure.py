"""What waits in the cluster hurries the loader; what others have taken does not keep it busy."""

from __future__ import annotations

import asyncio

from datapipe.events.registry import load_registry
from datapipe.mirrors.nats.mirror import open_nats
from datapipe.pipeline.buffer import Buffer
from datapipe.pipeline.loader import Loader
from datapipe.pipeline.records import Records
from datapipe.sinks.memory import MemoryDatabase, MemorySink
from tests.jetstream import NatsCluster
from tests.mirror_nats import Members, opened, segment, settings_of, store, take_until
from tests.service import until


async def test_under_pressure_others_work_is_asked_for_now_and_then(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    settings = settings_of(nats_node, nats_prefix, buffer_max_bytes=1 << 20, load_interval=300)
    sink = MemorySink(MemoryDatabase(), "one")
    died: list[BaseException] = []
    async with (
        opened(nats_node, nats_prefix, "two") as two,
        open_nats(settings, "one") as mirror,
    ):
        await store(two, *[segment(n, size=100_000) for n in range(8)])
        taken = await take_until(two, 8)
        await mirror.recover(Members())
        assert mirror.pressed
        buffer = Buffer(mirror, settings, lambda seconds: None, died.append)
        registry = load_registry(settings)
        loader = Loader(buffer, sink, registry, settings, Records(), lambda seconds: None)
        async with loader.running(died.append):
            await asyncio.sleep(3)
            assert 1 <= mirror.state().calls["next"] <= 5
            two.requeue("install", taken, put_off=False)

            async def loaded() -> bool:
                await mirror.keep(Members())
                buffer.wake.set()
                return buffer.lane("install").loaded == 8

            await until(loaded, 10)  # long before its interval
        assert buffer.lane("install").balanced
    assert not died
