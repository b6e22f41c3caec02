"""Several machines: three NATS servers, two machines of datapipe, nginx in front, as shipped."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import nats
import nkeys
import pytest
import trustme
from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeout

from tests.deploy.shipped import moved
from tests.jetstream import NatsNode, request
from tests.service import ROOT

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


async def test_the_rights_are_for_datapipe_alone(machines: Machines) -> None:
    client = await machines.client()
    stream = {"name": "datapipe_x", "subjects": ["datapipe.x.*"], "num_replicas": 3}
    try:
        made = await request(client, "STREAM.CREATE.datapipe_x", stream)
        assert made["config"]["num_replicas"] == 3
        assert (await request(client, "STREAM.NAMES", {}))["streams"] == ["datapipe_x"]
        for denied in ("STREAM.DELETE.datapipe_x", "STREAM.PURGE.datapipe_x"):
            with pytest.raises(NatsTimeout):  # it says no more than that
                await client.request(f"$JS.API.{denied}", b"{}", timeout=1)
        assert (await request(client, "STREAM.NAMES", {}))["streams"] == ["datapipe_x"]
    finally:
        await client.close()
