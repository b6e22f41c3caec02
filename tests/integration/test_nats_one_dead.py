"""One lane's node is dead, and nobody else stores it: the others go on as if nothing were."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from datapipe.mirrors.nats.streams import stream_config
from datapipe.settings import Settings
from tests.jetstream import NatsCluster, NatsNode, request
from tests.service import Service, until

DEAD = {"event_name": "install", "user_id": 1, "timestamp": 2}
HEALTHY = {"event_name": "purchase", "user_id": 1, "timestamp": 2, "sku": "a"}
INTERVAL_S = 1.0
TIMEOUT_S = 3.0


async def node_of_its_own(cluster: NatsCluster, settings: Settings) -> NatsNode:
    """Make both streams; the node that stores `install`, and not `purchase`."""
    async with cluster.client() as client:

        async def make(lane: str) -> NatsNode:
            config = {**stream_config(settings, lane), "num_replicas": 1}
            await request(client, f"STREAM.CREATE.{config['name']}", config)
            node = None
            while node is None:
                node = await asyncio.to_thread(cluster.leader_of, config["name"])
            return node

        other = await make("purchase")
        while (node := await make("install")) is other:
            await request(client, "STREAM.DELETE.datapipe_install", {})
        return node


async def posted(service: Service, event: object) -> tuple[int, str | None, float]:
    """Status, Retry-After, and the seconds that it took."""
    began = time.monotonic()
    async with service.session.post(f"{service.url}/", json=event) as response:
        await response.read()
        return response.status, response.headers.get("Retry-After"), time.monotonic() - began


async def accepts(service: Service, event: object) -> bool:
    return (await posted(service, event))[0] == 200


async def loaded(service: Service) -> int:
    """Rows of the healthy lane that this process has loaded."""
    lanes = (await service.status())["lanes"]
    return int(lanes["purchase"]["loaded"])


async def settled(service: Service) -> bool:
    return (await service.get("/readyz"))[0] == 200


async def test_the_others_go_on_and_it_heals_by_itself(
    own_nats: NatsCluster, make_service: Callable[..., Service], database: str
) -> None:
    more = {"nats_replicas": 1, "nats_lane_max_bytes": 1 << 20, "mirror_timeout": TIMEOUT_S}
    node = await node_of_its_own(own_nats, Settings(**more))
    ours = {"database_url": database, **more, **own_nats.settings}
    service = await make_service(load_interval=INTERVAL_S, **ours).start()
    other = await make_service(load_interval=300, **ours).start()
    for each, event in ((service, DEAD), (service, HEALTHY), (other, HEALTHY)):
        await until(partial(accepts, each, event))
    await service.drained()
    await asyncio.to_thread(node.kill)
    try:
        for each in (service, other):  # each of them may have been talking to that one
            await until(partial(accepts, each, HEALTHY))
            await until(partial(settled, each))
        await others_events_are_loaded_in_time(service, other)
        await it_alone_is_refused(service)
    finally:
        await asyncio.to_thread(node.start)
    await until(partial(accepts, service, DEAD))
    books = await service.drained()
    assert books["balanced"]
    for each in (service, other):
        assert await each.stop() == 0


async def others_events_are_loaded_in_time(service: Service, other: Service) -> None:
    """Nothing is posted to the one that loads."""
    for _ in range(5):
        await service.drained()
        before = await loaded(service) + await loaded(other)
        assert await accepts(other, HEALTHY)
        async with asyncio.timeout(INTERVAL_S + 2):
            while await loaded(service) + await loaded(other) == before:
                await asyncio.sleep(0.05)


async def it_alone_is_refused(service: Service) -> None:
    status, retry_after, took_s = await posted(service, DEAD)
    assert (status, took_s < TIMEOUT_S + 1) == (503, True)
    assert int(retry_after or 0) >= 1
    again = [await posted(service, DEAD) for _ in range(3)]
    assert min(took_s for _, _, took_s in again) < 0.5  # the machine may be busy
    assert all(status == 503 and int(retry_after or 0) >= 1 for status, retry_after, _ in again)

    async def try_the_dead() -> None:
        while True:
            assert (await posted(service, DEAD))[0] == 503
            await asyncio.sleep(0.1)

    trying = asyncio.create_task(try_the_dead())
    for number in range(40):  # ten seconds
        if number % 4 == 0:
            assert await accepts(service, HEALTHY)
        assert (await service.get("/readyz"))[0] == 200
        assert (await service.status())["mirror"]["up"]
        await asyncio.sleep(0.25)
    assert not trying.done()
    trying.cancel()
