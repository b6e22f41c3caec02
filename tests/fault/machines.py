"""Processes that share nothing but a NATS cluster and a database, and a driver that posts to all.

A round is one fault under load. Then all is healed, the clients stop, and once nothing waits any
more every event that was answered 200 must be in its table, once, and the books must balance.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fault.driver import LANES, Driver, Verdict
from tests.fault.hosts import Disk, Network
from tests.fault.modules.quick_nats import ACK_WAIT_S
from tests.fault.moments import Moment
from tests.fault.pipe import Pipe
from tests.fault.proxy import Proxy
from tests.jetstream import NatsCluster, NatsNode
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
QUICK = "tests.fault.modules.quick_nats"
NODES = 3
_PROBE_PAUSE_S = 0.1


@dataclass(slots=True)
class Pauses:
    """What clients felt of a fault, in seconds; the worst of all lanes.

    Attributes:
        post_s: until a POST that is sent again and again was answered 200.
        load_s: from one load to the next.
        settle_s: until nothing waited any more, once all was healed and no more came.
    """

    post_s: float = 0.0
    load_s: float = 0.0
    settle_s: float = 0.0


class Machines:
    """Attributes:
    services: the first reaches the cluster by `pipes`, each the database by one of `proxies`.
    away: those that get no requests, as by a load balancer.
    network, disks: of the nodes, for root; else None and [].
    """

    def __init__(self, cluster: NatsCluster, postgres: Postgres, chance: random.Random) -> None:
        self.cluster = cluster
        self.postgres = postgres
        self.chance = chance
        self.database = postgres.create_database()
        self.prefix = f"t{chance.getrandbits(40):x}"
        self.services: list[Service] = []
        self.proxies: list[Proxy] = []
        self.pipes: list[Pipe] = []
        self.network: Network | None = None
        self.disks: list[Disk] = []
        self.away: set[Service] = set()
        self.ack_wait_s = ACK_WAIT_S
        self.driver = Driver(self._url, chance.getrandbits(32), connections=8, certain=False,
                             pause_s=0.02, waits=0.1)  # fmt: skip
        self._loads: list[tuple[float, str]] = []  # when, and the lane
        self._seen: dict[Service, int] = {}

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        folder: Path,
        postgres: Postgres,
        make_service: MakeService,
        chance: random.Random,
        *,
        processes: int = 3,
        apart: bool = False,
        ack_wait_s: float = ACK_WAIT_S,
        modules: Iterable[str] = (),
        **settings: Any,
    ) -> AsyncIterator[Machines]:
        """Run all.

        Args:
            apart: each node on a host of its own, with its own disk; needs root.
            ack_wait_s: until others get what nobody has acknowledged, as in `quick_nats` or as it
                is usually.
        """
        modules = [*modules, QUICK] if ack_wait_s == ACK_WAIT_S else list(modules)
        async with AsyncExitStack() as stack:
            network, disks, options = None, [], dict[str, Any]()
            if apart:
                network = stack.enter_context(Network.up(NODES))
                disks = [
                    stack.enter_context(Disk.mounted(folder / f"disk{number}"))
                    for number in range(NODES)
                ]
                options = {
                    "hosts": network.addresses, "inside": network.inside,
                    "stores": [disk.folder / "store" for disk in disks],
                }  # fmt: skip
            cluster = stack.enter_context(
                NatsCluster.running(folder / "nats", advertise=False, **options)
            )
            machines = cls(cluster, postgres, chance)
            machines.network, machines.disks = network, disks
            machines.ack_wait_s = ack_wait_s
            for node in cluster.nodes:
                pipe = Pipe.running(node.host, node.port)
                machines.pipes.append(await stack.enter_async_context(pipe))
            for number in range(processes):
                proxy = await stack.enter_async_context(Proxy(machines.database).running())
                home = folder / f"process{number}"
                home.mkdir()
                machines.proxies.append(proxy)
                machines.services.append(
                    make_service(
                        **cluster.settings
                        | {
                            "nats_url": machines._urls(number), "nats_prefix": machines.prefix,
                            "database_url": proxy.url, "data_dir": str(home),
                            "load_interval": 0.5, "event_modules": modules, **settings,
                        }
                    )
                )  # fmt: skip
            await asyncio.gather(*(service.start() for service in machines.services))
            watching = asyncio.create_task(machines._watch())
            try:
                await asyncio.gather(*(machines.driver.one(lane) for lane in LANES))
                yield machines
            finally:
                for number, service in enumerate(machines.services):
                    log = folder / f"process{number}" / "log"
                    log.write_text("\n".join(service.raw))
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching

    def _urls(self, number: int) -> str:
        if number:
            return self.cluster.urls
        return ",".join(f"nats://127.0.0.1:{pipe.port}" for pipe in self.pipes)

    # --- who is there ---

    @property
    def serving(self) -> list[Service]:
        return [
            each for each in self.services
            if each not in self.away and each._process and each._process.returncode is None
        ]  # fmt: skip

    def _url(self) -> str:
        serving = self.serving
        return self.chance.choice(serving).url if serving else ""

    def any_service(self) -> tuple[Service, Proxy]:
        number = self.chance.randrange(len(self.services))
        return self.services[number], self.proxies[number]

    async def any_stream(self) -> str:
        """One that has a leader."""
        stream = f"{self.prefix}_{self.chance.choice(LANES)}"
        await until(lambda: asyncio.to_thread(self.cluster.caught_up, stream), 60, "a leader")
        return stream

    async def leader(self) -> NatsNode:
        """Of a stream."""
        stream = await self.any_stream()
        node = await asyncio.to_thread(self.cluster.leader_of, stream)
        return node or self.cluster.nodes[0]

    async def follower(self) -> NatsNode:
        stream = await self.any_stream()
        leader = await asyncio.to_thread(self.cluster.leader_of, stream)
        return self.chance.choice([node for node in self.cluster.nodes if node is not leader])

    # --- what can be done to nodes and processes ---

    async def start_nodes(self) -> None:
        """Those that don't run; that they have caught up is for `settled` to see."""
        for node in self.cluster.nodes:
            if not node.running:
                node.launch()

        async def answer() -> bool:
            return all(await asyncio.gather(*map(_answers, self.cluster.nodes)))

        await until(answer, 60, "nodes that answer")

    @asynccontextmanager
    async def frozen(self, service: Service) -> AsyncIterator[None]:
        os.kill(service.pid, signal.SIGSTOP)
        self.away.add(service)
        try:
            yield
        finally:
            os.kill(service.pid, signal.SIGCONT)
            self.away.discard(service)

    async def kill_at(self, service: Service, proxy: Proxy, moment: Moment | None) -> None:
        """SIGKILL at such a moment of a load, and start it again."""

        async def act() -> bool:
            os.kill(service.pid, signal.SIGKILL)
            return moment is not Moment.COMMIT

        await (proxy.at(moment, act, 40) if moment is not None else act())
        await service.kill()
        await self.goes_on()
        await service.start()

    async def freeze_at(self, service: Service, proxy: Proxy, moment: Moment | None) -> None:
        """Stop it at such a moment for longer than NATS waits for an acknowledgement."""

        async def act() -> bool:
            async with self.frozen(service):
                await asyncio.sleep(self.ack_wait_s + self.chance.uniform(0.5, 2.0))
            return True

        await (proxy.at(moment, act, 40) if moment is not None else act())

    # --- a round ---

    async def goes_on(self, timeout_s: float = 60.0) -> None:
        """Wait until an event of each lane has been answered 200."""
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as all_lanes:
            for lane in LANES:
                all_lanes.create_task(self.driver.one(lane))

    def leaderless(self) -> bool:
        """Whether the servers have left a stream without a leader, for ever: see docs/scale.md."""
        tired = "catchup aborted, no leader for stream"
        return any(tired in node.log_file.read_text()[-1500:] for node in self.cluster.nodes)

    async def round(self, fault: Callable[[Machines], Awaitable[None]]) -> Pauses:
        """Do something, see it healed, and compare; AssertionError if anything is lost or twice."""
        pauses, started = Pauses(), time.monotonic()
        async with self.driver.running(), self._probing() as posts:
            await self.goes_on()
            began = time.monotonic()
            await fault(self)
            await self.goes_on()
            ended = time.monotonic()
        pauses.post_s = max((took for since, took in posts if since + took > began), default=0.0)
        await self.driver.settle(60)
        pauses.settle_s = await self.settled()
        pauses.load_s = self._longest_without_load(started, began, ended)
        await self.check()
        return pauses

    @asynccontextmanager
    async def _probing(self) -> AsyncIterator[list[tuple[float, float]]]:
        """Send to each lane, one event after the other; yields when each began, and took."""
        posts: list[tuple[float, float]] = []
        ending = False

        async def probe(lane: str) -> None:
            while not ending:
                began = time.monotonic()
                posts.append((began, await self.driver.one(lane)))
                await asyncio.sleep(_PROBE_PAUSE_S)

        async with asyncio.TaskGroup() as probes:
            for lane in LANES:
                probes.create_task(probe(lane))
            yield posts
            ending = True

    async def _watch(self) -> None:
        """For ever: note when something was loaded."""
        while True:
            for service in self.services:
                seen = self._seen.get(service, 0)
                for line in service.lines[seen:]:
                    if line.get("event") == "segments loaded" and line["rows"]:
                        self._loads.append((time.monotonic(), line["lane"]))
                self._seen[service] = len(service.lines)
            await asyncio.sleep(0.02)

    def _longest_without_load(self, started: float, began: float, ended: float) -> float:
        """Of any lane, in a time of load that started, in which a fault began and ended."""
        longest = 0.0
        for lane in LANES:
            before = [at for at, of in self._loads if of == lane and at <= began]
            times = [at for at, of in self._loads if of == lane and at > began]
            last = max([started, *before])
            for at in times:
                if last <= ended:
                    longest = max(longest, at - last)
                last = at
        return longest

    async def settled(self, timeout_s: float = 90.0) -> float:
        """Wait until nothing waits, in the cluster or in hand; how long that took, in seconds."""
        began = time.monotonic()
        try:
            await until(self._nothing_waits, timeout_s)
        except AssertionError:
            found = [await service.status() for service in self.serving]
            raise AssertionError([(each["books"], each["summary"]) for each in found]) from None
        return time.monotonic() - began

    async def _nothing_waits(self) -> bool:
        for service in self.services:
            books = (await service.status())["books"]
            if books["waiting"] or books.get("in_hand", 0) or not books["balanced"]:
                return False
        return await self._all_caught_up() and await self.messages() == 0

    async def caught_up(self) -> None:
        """Wait until each node has all that it should."""
        await until(self._all_caught_up, 60, "nodes that have caught up")

    async def _all_caught_up(self) -> bool:
        for node in self.cluster.nodes:
            if not await asyncio.to_thread(node.healthy):
                return False
        for lane in LANES:
            if not await asyncio.to_thread(self.cluster.caught_up, f"{self.prefix}_{lane}"):
                return False
        return True

    async def messages(self) -> int:
        """In all streams, as their leaders count; -1: not all of them answer."""
        counts = [
            await asyncio.to_thread(self._messages, f"{self.prefix}_{lane}") for lane in LANES
        ]
        return -1 if -1 in counts else sum(counts)

    def _messages(self, name: str) -> int:
        node = self.cluster.leader_of(name)
        found = node.ask("/jsz?accounts=true&streams=true") if node is not None else {}
        for account in found.get("account_details", []):
            for stream in account.get("stream_detail") or []:
                if stream["name"] == name:
                    return int(stream["state"]["messages"])
        return -1

    async def check(self) -> Verdict:
        """Every event answered 200 is in, once; no process had a fault of its own."""
        for service in self.services:
            for line in ("fault", "background task died", "message unreadable", "stream is gone"):
                assert not service.logged(line), (line, service.logged(line)[:2])
        return await self.driver.check(self.database)


async def _answers(node: NatsNode) -> bool:
    return bool(await asyncio.to_thread(node.ask, "/varz"))
