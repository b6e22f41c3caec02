"""Several machines: three NATS servers, two machines of datapipe, nginx in front, as shipped."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import nats
import nkeys
import pytest
import trustme
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeout

from tests.deploy.nginx import nginx
from tests.deploy.shipped import moved
from tests.deploy.supervisor import Supervisor
from tests.fault.driver import Driver
from tests.jetstream import NatsNode, leader_of, request
from tests.service import ROOT, until

HOSTS = [f"nats-{number}.example.internal" for number in (1, 2, 3)]


class Machines:
    """The machines of the NATS servers, each with the files that it would have in /etc/nats."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca_file)
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        self.seed_file = folder / "nats.nk"
        self.seed_file.write_bytes(seed)
        self._public = nkeys.from_seed(bytearray(seed)).public_key.decode()
        self.nodes = [NatsNode(folder, host.partition(".")[0], scheme="tls") for host in HOSTS]
        for node in self.nodes:
            self._set_up(node)

    def _set_up(self, node: NatsNode) -> None:
        certificate = self.authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(node.folder / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(node.folder / "cert.pem")
        self.authority.cert_pem.write_to_path(node.folder / "ca.pem")
        here = "127.0.0.1"
        places = {
            "0.0.0.0:4222": f"{here}:{node.port}", "0.0.0.0:6222": f"{here}:{node.route_port}",
            "127.0.0.1:8222": f"{here}:{node.http_port}",
            "/var/lib/nats": str(node.store), "/etc/nats": str(node.folder),
        }  # fmt: skip
        for host, each in zip(HOSTS, self.nodes, strict=True):
            places[f"nats://{host}:6222"] = each.route
        moved("cluster/nats-common.conf", node.folder, places)
        shipped = (ROOT / "deploy/cluster/nats-accounts.conf").read_text()
        (key,) = re.findall(r"nkey: (U\w+)", shipped)
        moved("cluster/nats-accounts.conf", node.folder, {key: self._public})
        node.file = moved(f"cluster/{node.name}.conf", node.folder, {})

    @property
    def urls(self) -> str:
        return ",".join(node.url for node in self.nodes)

    def settings(self, database: str) -> dict[str, Any]:
        """Of datapipe: the file that is shipped, with what it says to change."""
        changed = {
            "database_url": database, "nats_url": self.urls, "nats_nkey_file": str(self.seed_file),
            "nats_ca_file": str(self.ca_file),
        }  # fmt: skip
        shipped = json.loads((ROOT / "deploy/cluster/datapipe.json").read_text())
        assert shipped.keys() - changed.keys() == {"mirror"}
        return {**shipped, **changed}

    def leader_of(self, stream: str) -> NatsNode | None:
        return leader_of(self.nodes, stream)

    async def client(self) -> Client:
        trusting = ssl.create_default_context()
        self.authority.configure_trust(trusting)
        seed = str(self.seed_file)
        return await nats.connect(self.urls.split(","), tls=trusting, nkeys_seed=seed)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    folder = tmp_path / "nats"
    folder.mkdir()
    made = Machines(folder)
    try:
        for node in made.nodes:
            node.launch()
        for node in made.nodes:
            node.wait(60)
        yield made
    finally:
        for node in made.nodes:
            node.kill()


async def test_a_process_a_node_and_a_machine_are_lost(
    machines: Machines, database: str, tmp_path: Path, seed: int
) -> None:
    """Events come by nginx; what was answered is in its table once."""
    settings = machines.settings(database) | {"load_interval": 0.5, "load_min_interval": 0.1}
    async with AsyncExitStack() as stack:
        supervisors = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            made = Supervisor(tmp_path / name, "cluster/supervisord.conf", 2, **settings)
            supervisors.append(await stack.enter_async_context(made.running()))
        one, two = supervisors
        for each in supervisors:
            await until(each.listening, what="a machine that runs")
        places = {
            f"10.0.0.2{number}:8080": each.url.removeprefix("http://")
            for number, each in enumerate(supervisors, 1)
        }
        front = nginx(tmp_path, "cluster/nginx.conf", places)
        base, trusting = await stack.enter_async_context(front)
        # a NATS server that dies may have stored what it did not confirm: then 503 is not certain
        driver = Driver(lambda: base, seed, tls=trusting, certain=False)

        async with driver.running():
            await driver.answered(200)
            os.kill((await one.pids())["datapipe:1"], signal.SIGKILL)
            await driver.answered(100)
            leader = machines.leader_of("datapipe_install")
            assert leader is not None
            await asyncio.to_thread(leader.kill)
            await driver.answered(200, 60)
            assert await two.stop() == 0
            connector = aiohttp.TCPConnector(ssl=trusting)
            async with aiohttp.ClientSession(base, connector=connector) as session:
                for _ in range(30):
                    async with session.get("/healthz") as response:
                        assert response.status == 200, "the other machine is asked instead"
            await driver.answered(100, 60)
            await asyncio.to_thread(leader.start)
            await driver.answered(100, 60)
        await driver.settle(60)

        async def empty() -> bool:
            return bool((await one.status())["books"]["waiting"] == 0)

        # what the killed process had in hand comes back after 30 s
        await until(empty, 90, "an empty cluster")
        assert await one.stop() == 0
    verdict = await driver.check(database)
    print(f"{verdict.answered} events answered, {len(verdict.lost)} lost, {driver.torn} torn")


async def test_three_servers_flush_and_let_in_who_has_the_key(machines: Machines) -> None:
    for node in machines.nodes:
        assert node.ask("/varz")["jetstream"]["config"]["sync_always"] is True
        assert node.ask("/jsz")["meta_cluster"]["cluster_size"] == 3
    url = machines.nodes[0].url
    with pytest.raises(Exception, match="certificate verify failed"):
        await nats.connect(url, allow_reconnect=False)
    trusting = ssl.create_default_context()
    machines.authority.configure_trust(trusting)
    with pytest.raises(Exception, match="Authorization"):
        await nats.connect(url, tls=trusting, allow_reconnect=False)


async def asked(client: Client, subject: str) -> list[bytes]:
    """Three messages that answer one, as a process does that takes its time."""

    async def answer(message: Msg) -> None:
        for body in (b"1", b"2", b"3"):
            await client.publish(message.reply, body)

    await client.subscribe(subject, cb=answer)
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(subject, b"?", reply=inbox)
    return [(await answers.next_msg(timeout=5)).data for _ in range(3)]


async def test_the_rights_are_for_datapipe_alone(machines: Machines) -> None:
    client = await machines.client()
    stream = {"name": "datapipe_x", "subjects": ["datapipe.x.*"], "num_replicas": 3}
    try:
        made = await request(client, "STREAM.CREATE.datapipe_x", stream)
        assert made["config"]["num_replicas"] == 3
        assert (await request(client, "STREAM.NAMES", {}))["streams"] == ["datapipe_x"]
        assert await asked(client, "datapipe.peers") == [b"1", b"2", b"3"]
        for denied in ("STREAM.DELETE.datapipe_x", "STREAM.PURGE.datapipe_x"):
            with pytest.raises(NatsTimeout):  # it says no more than that
                await client.request(f"$JS.API.{denied}", b"{}", timeout=1)
        assert (await request(client, "STREAM.NAMES", {}))["streams"] == ["datapipe_x"]
    finally:
        await client.close()
