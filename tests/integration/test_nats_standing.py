"""The NATS servers of the tests do what the fault tests count on."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest
import trustme
from nats.aio.client import Client
from nats.errors import Error

from tests.jetstream import NatsCluster, request
from tests.service import until


async def make_stream(client: Client, name: str, replicas: int) -> None:
    stream = {"name": name, "subjects": [f"{name.replace('_', '.')}.*"], "num_replicas": replicas,
              "storage": "file", "retention": "workqueue", "max_bytes": 2**20}  # fmt: skip
    await request(client, f"STREAM.CREATE.{name}", stream)


async def publish(client: Client, subject: str, id: str) -> None:
    """Publish until it is stored, under one id."""

    async def stored() -> bool:
        try:
            message = await client.request(subject, b"x", timeout=2, headers={"Nats-Msg-Id": id})
        except Error:  # nobody leads, or does not answer
            return False
        return "error" not in json.loads(message.data)

    await until(stored, what="a message that is stored")


async def messages(client: Client, stream: str) -> int:
    found: int = (await request(client, f"STREAM.INFO.{stream}", {}))["state"]["messages"]
    return found


async def test_a_server_alone(nats_node: NatsCluster, nats_prefix: str) -> None:
    stream = f"{nats_prefix}_install"
    async with nats_node.client() as client:
        await make_stream(client, stream, 1)
        await publish(client, f"{nats_prefix}.install.1", "a")
        assert await messages(client, stream) == 1
    assert nats_node.leader_of(stream) is nats_node.nodes[0]
    assert nats_node.replicas_of(stream) == nats_node.nodes
    assert nats_node.caught_up(stream)
    await nats_node.delete_streams(nats_prefix)
    assert nats_node.leader_of(stream) is None


async def test_sync_is_always(nats_cluster: NatsCluster) -> None:
    for node in nats_cluster.nodes:
        assert node.ask("/varz")["jetstream"]["config"]["sync_always"] is True


async def test_a_leader_that_is_killed_is_replaced(own_nats: NatsCluster) -> None:
    async with own_nats.client() as client:
        await make_stream(client, "t_install", 3)
        await publish(client, "t.install.1", "a")
        leader = own_nats.leader_of("t_install")
        assert leader is not None
        assert len(own_nats.replicas_of("t_install")) == 3
        await asyncio.to_thread(leader.kill)
        await publish(client, "t.install.1", "b")
        assert own_nats.leader_of("t_install") not in (None, leader)
        await asyncio.to_thread(leader.start)

        async def complete() -> bool:
            return await asyncio.to_thread(own_nats.caught_up, "t_install")

        await until(complete, what="three replicas")
        assert await messages(client, "t_install") == 2


async def test_a_leader_that_is_frozen_is_replaced(own_nats: NatsCluster) -> None:
    async with own_nats.client() as client:
        await make_stream(client, "t_install", 3)
        leader = own_nats.leader_of("t_install")
        assert leader is not None
        leader.freeze()

        async def replaced() -> bool:
            return await asyncio.to_thread(own_nats.leader_of, "t_install") not in (None, leader)

        await until(replaced, what="another leader")
        leader.thaw()
        await publish(client, "t.install.1", "a")


async def test_all_killed_keep_what_they_have(own_nats: NatsCluster) -> None:
    async with own_nats.client() as client:
        await make_stream(client, "t_install", 3)
        await publish(client, "t.install.1", "a")
    own_nats.kill()
    assert not any(node.running for node in own_nats.nodes)
    await asyncio.to_thread(own_nats.start)
    async with own_nats.client() as client:
        await publish(client, "t.install.1", "b")
        assert await messages(client, "t_install") == 2


async def test_none_outlives_its_block(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), NatsCluster.running(tmp_path, 2, sync=None) as cluster:
        pids = [node.pid for node in cluster.nodes]
        cluster.nodes[0].freeze()
        1 / 0  # noqa: B018
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_addresses_users_and_tls_of_ones_own(tmp_path: Path) -> None:
    hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    authority = trustme.CA()
    authority.issue_cert(*hosts).private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    tls = f'cert_file: "{tmp_path}/pem", key_file: "{tmp_path}/pem"'
    more = 'accounts { A { jetstream: enabled, users: [{ user: "u", password: "p" }] } }'
    with NatsCluster.running(tmp_path, hosts=hosts, tls=tls, more=more) as cluster:
        assert [url.rpartition(":")[0] for url in cluster.urls.split(",")] == [
            f"tls://{host}" for host in hosts
        ]
        async with cluster.client(user="u", password="p", tls=trusting) as client:
            await make_stream(client, "t_install", 3)
            await publish(client, "t.install.1", "a")
        assert len(cluster.replicas_of("t_install")) == 3
