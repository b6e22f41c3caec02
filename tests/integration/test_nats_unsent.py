"""What a node did not get before the connection was lost is sent to none, neither then nor later.

nats-py would keep it until it has a connection again. By then the ledger may have forgotten it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import nats.errors
import pytest
from nats.aio.msg import Msg

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats.client import Client
from datapipe.settings import Settings
from tests.jetstream import NatsCluster

BYTES = 1_000_000


async def test_what_was_not_sent_when_the_connection_was_lost(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    heard: list[str] = []

    async def on_message(message: Msg) -> None:
        heard.append(message.subject.removeprefix(f"{nats_prefix}."))

    client = Client(Settings(mirror="nats", nats_url=nats_node.urls))
    async with nats_node.client() as listener, client.connecting(), asyncio.timeout(20):
        await listener.subscribe(f"{nats_prefix}.*", cb=on_message)
        await listener.flush()
        await client.wait_connected(10)
        await client.publish("t", f"{nats_prefix}.before")
        await client._connection.flush()
        unsent = f"PUB {nats_prefix}.unsent 0\r\n\r\n"
        await client._connection._send_command(unsent.encode())  # so it lies before nats-py's turn
        await client._connection._process_op_err(nats.errors.StaleConnectionError())
        assert client._connected.is_set()  # until the next turn of the event loop
        await client.publish("t", f"{nats_prefix}.meanwhile")
        with pytest.raises(MirrorUnavailable):
            await client.request("t", f"{nats_prefix}.asked")
        while "after" not in heard:
            with suppress(MirrorUnavailable):
                await client.publish("t", f"{nats_prefix}.after")
            await asyncio.sleep(0.05)
    assert set(heard) == {"before", "after"}


async def test_what_a_frozen_node_has_not_read_when_it_is_left() -> None:
    """More than the kernel takes of it: the rest lies with us, and must not follow."""
    reads, got = asyncio.Event(), 0

    async def node(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        writer.write(b'INFO {"server_id":"n","version":"2.11.0","max_payload":1048576,'
                     b'"headers":true}\r\n')  # fmt: skip
        with suppress(ConnectionError):
            while not (await reader.readline()).startswith(b"PING"):
                pass
            writer.write(b"PONG\r\n")
            await reads.wait()
            while data := await reader.read(1 << 20):
                got += len(data)
        writer.close()

    server = await asyncio.start_server(node, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = Client(Settings(mirror="nats", nats_url=url))
    async with client.connecting(), asyncio.timeout(20):
        await client.wait_connected(10)
        for _ in range(40):  # so that nats-py hands all of it to the socket at once
            await client._connection._send_command(b"PUB t %d\r\n%b\r\n" % (BYTES, b"x" * BYTES))
        await client.publish("t", "t")
        await asyncio.sleep(0.2)
        server.close()
        await client._connection._process_op_err(nats.errors.StaleConnectionError())
        while client._connected.is_set():
            await asyncio.sleep(0.01)
        reads.set()
        await asyncio.sleep(1)
    assert 0 < got < 20 * BYTES
