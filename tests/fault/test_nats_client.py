"""The client's own node is there and no use: another one is taken."""

from __future__ import annotations

import asyncio
import time

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats.client import Client
from datapipe.settings import Settings
from tests.jetstream import NatsCluster

MESSAGES, BYTES = 40, 900_000  # more than the kernel takes for a node that reads nothing


async def test_a_node_that_freezes_with_much_unread(own_nats: NatsCluster) -> None:
    client = Client(Settings(mirror="nats", nats_url=own_nats.urls))
    async with client.connecting():
        stream = {"name": "t", "subjects": ["t.*"], "num_replicas": 3, "storage": "file"}
        await client.api("STREAM.CREATE.t", timeout_s=20, **stream)
        url = client._connection.connected_url
        assert url is not None
        node = next(each for each in own_nats.nodes if str(each.port) in url.netloc)
        node.freeze()
        until = time.monotonic() + 30

        async def publish(number: int) -> None:
            while True:
                try:
                    await client.request("publish", f"t.{number}", b"x" * BYTES)
                    return
                except MirrorUnavailable:
                    assert time.monotonic() < until, "no other node was taken"
                    await asyncio.sleep(0.3)

        await asyncio.gather(*(publish(number) for number in range(MESSAGES)))
