"""One lane's node is dead, and nobody else stores it: the others go on as if nothing were."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

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


async def settled(service: Service) -> bool:
    return (await service.get("/readyz"))[0] == 200


async def test_the_others_go_on_and_it_heals_by_itself(
    own_nats: NatsCluster, make_service: Callable[..., Service], database: str
) -> None:
    more = {"nats_replicas": 1, "nats_lane_max_bytes": 1 << 20, "mirror_timeout": TIMEOUT_S}
    node = await node_of_its_own(own_nats, Settings(**more))
    service = make_service(
        database_url=database, load_interval=INTERVAL_S, **more, **own_nats.settings
    )
    await service.start()
    for event in (DEAD, HEALTHY):
        await until(lambda event=event: accepts(service, event))  # type: ignore[misc]
    await service.drained()
    await asyncio.to_thread(node.kill)
    try:
        # it may have been the one that we, or all, were talking to
        await until(lambda: accepts(service, HEALTHY))
        await until(lambda: settled(service))
        status, retry_after, took_s = await posted(service, DEAD)
        assert (status, took_s < TIMEOUT_S + 2) == (503, True)
        assert int(retry_after or 0) >= 1
        status, retry_after, took_s = await posted(service, DEAD)
        assert (status, took_s < 0.5) == (503, True)
        assert int(retry_after or 0) >= 1

        async def try_the_dead() -> None:
            while True:
                assert (await posted(service, DEAD))[0] == 503

        trying = asyncio.create_task(try_the_dead())
        for number in range(40):  # ten seconds
            if number % 4 == 0:
                assert await accepts(service, HEALTHY)
            assert (await service.get("/readyz"))[0] == 200
            assert (await service.status())["mirror"]["up"]
            await asyncio.sleep(0.25)
        assert not trying.done()
        trying.cancel()
    finally:
        await asyncio.to_thread(node.start)
    await until(lambda: accepts(service, DEAD))
    books = await service.drained()
    assert books["balanced"]
    assert await service.stop() == 0
