"""The connection to a cluster: nodes that are no use are left, subscriptions outlive them."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from nats.aio.msg import Msg

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


async def test_what_is_subscribed_while_it_reconnects(own_nats: NatsCluster) -> None:
    client, heard = Client(Settings(mirror="nats", nats_url=own_nats.urls)), asyncio.Event()

    async def on_message(message: Msg) -> None:
        heard.set()

    async with client.connecting(), asyncio.timeout(30):
        while not client._connected.is_set():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(own_nats.kill)
        while client._connected.is_set():
            await asyncio.sleep(0.01)
        await client.subscribe("t", on_message)
        await asyncio.to_thread(own_nats.start)
        while not heard.is_set():
            with suppress(MirrorUnavailable):
                await client.publish("t", "t")
            await asyncio.sleep(0.05)


async def test_nothing_is_left_of_a_connection_that_was_just_lost(own_nats: NatsCluster) -> None:
    """At any turn: what drops its cancellation would keep the process from ending."""
    before, outlived = asyncio.all_tasks(), []
    for turns in range(30):
        client = Client(Settings(mirror="nats", nats_url=own_nats.urls))
        async with client.connecting():
            await client.wait_connected(10)
            client._connection.abort()
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        for task in asyncio.all_tasks() - before:
            outlived.append((turns, task))
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.1)
    assert outlived == []


async def test_nodes_that_only_other_nodes_tell_of(own_nats: NatsCluster) -> None:
    client = Client(Settings(mirror="nats", nats_url=own_nats.nodes[0].url))
    async with client.connecting(), asyncio.timeout(30):
        for _ in range(2):
            await client.wait_connected(10)
            url = client._connection.connected_url
            assert url is not None
            next(each for each in own_nats.nodes if str(each.port) in url.netloc).kill()
            while client._connected.is_set():
                await asyncio.sleep(0.01)
        await client.wait_connected(10)
