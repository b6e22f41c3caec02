"""Streams are made and marked, whoever else does so at the same moment."""

from __future__ import annotations

import asyncio

from datapipe.mirrors.nats.client import Client
from datapipe.mirrors.nats.streams import Streams
from datapipe.settings import Settings
from tests.jetstream import NatsCluster

MAKE_S = 5.0


async def test_a_mark_does_not_take_the_answer_of_a_stream_that_is_being_made(
    nats_cluster: NatsCluster, nats_prefix: str
) -> None:
    """The stream is listed before it has a leader; until then an update would replace its making.

    Then nothing could be appended until the making timed out, after 10 s.
    """
    settings = Settings(
        mirror="nats", nats_url=nats_cluster.urls, nats_prefix=nats_prefix, database_url="x"
    )
    client = Client(settings)
    async with client.connecting(), asyncio.timeout(MAKE_S):
        streams = Streams(client, settings)
        making = asyncio.create_task(streams.ensure("install"))
        while not await streams.names():
            await asyncio.sleep(0)
        await streams.put_mark(streams.of("install"), "mark")
        stream = await making
        await streams.look_at(stream)
        assert stream.mark == "mark"
