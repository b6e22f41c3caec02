"""Faults of several processes, the cluster and the database that they share, by name.

Each does something to running machines, and undoes it before it returns.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from nats.errors import Error
from nats.js.errors import APIError

from tests.fault.driver import LANES
from tests.fault.hosts import power_cut
from tests.fault.machines import Machines
from tests.fault.moments import Moment, cut
from tests.jetstream import NatsNode, request
from tests.service import until

Fault = Callable[[Machines], Awaitable[None]]
# a stream's next leader is there within 4 to 9 s; a client's own node is missed within 6
_FROZEN_S = 7.0


# --- a process ---


def killed(moment: Moment | None) -> Fault:
    async def fault(machines: Machines) -> None:
        await machines.kill_at(*machines.any_service(), moment)

    return fault


def frozen(moment: Moment | None) -> Fault:
    async def fault(machines: Machines) -> None:
        await machines.freeze_at(*machines.any_service(), moment)

    return fault


# --- a node ---


async def _killed(machines: Machines, node: NatsNode) -> None:
    await asyncio.to_thread(node.kill)
    await machines.goes_on()
    await machines.start_nodes()


async def _terminated(machines: Machines, node: NatsNode) -> None:
    await asyncio.to_thread(node.terminate)
    await machines.goes_on()
    await machines.start_nodes()


async def _frozen(machines: Machines, node: NatsNode) -> None:
    node.freeze()
    await asyncio.sleep(_FROZEN_S)
    await machines.goes_on()
    node.thaw()


async def _full(machines: Machines, node: NatsNode) -> None:
    """Its disk is full; JetStream there may switch itself off, until it is started again."""
    disk = machines.disks[machines.cluster.nodes.index(node)]
    disk.fill()
    try:
        await asyncio.sleep(2.0)
        await machines.goes_on()
    finally:
        disk.empty()
    await asyncio.to_thread(node.terminate)
    await machines.start_nodes()


async def _cut_off(machines: Machines, node: NatsNode) -> None:
    """Nothing reaches it."""
    number, network = machines.cluster.nodes.index(node), machines.network
    assert network is not None
    network.cut(number)
    try:
        await asyncio.sleep(_FROZEN_S)
        await machines.goes_on()
    finally:
        network.join(number)


async def _parted(machines: Machines, node: NatsNode) -> None:
    """The processes reach it, the other nodes don't."""
    number, network = machines.cluster.nodes.index(node), machines.network
    assert network is not None
    network.part(number)
    try:
        await asyncio.sleep(_FROZEN_S)
        await machines.goes_on()
    finally:
        network.unite(number)


def leader(act: Callable[[Machines, NatsNode], Awaitable[None]]) -> Fault:
    async def fault(machines: Machines) -> None:
        await act(machines, await machines.leader())

    return fault


def follower(act: Callable[[Machines, NatsNode], Awaitable[None]]) -> Fault:
    async def fault(machines: Machines) -> None:
        await act(machines, await machines.follower())

    return fault


# --- the cluster ---


async def two_down(machines: Machines) -> None:
    nodes = machines.chance.sample(machines.cluster.nodes, 2)
    for node in nodes:
        await asyncio.to_thread(node.kill)
    await asyncio.sleep(machines.chance.uniform(1.0, 6.0))
    await machines.start_nodes()


async def all_down(machines: Machines) -> None:
    await asyncio.to_thread(machines.cluster.kill)
    await asyncio.sleep(machines.chance.uniform(0.0, 3.0))
    await machines.start_nodes()


async def power_lost(machines: Machines) -> None:
    """All nodes lose what was not flushed."""
    await asyncio.to_thread(machines.cluster.kill)
    await asyncio.to_thread(power_cut, machines.disks)
    await machines.start_nodes()


# --- the connections of the first process to the cluster ---


async def slow_connection(machines: Machines) -> None:
    """Answers come late, or too late to be waited for."""
    for delay_s in (0.3, 1.5):
        for pipe in machines.pipes:
            pipe.delay_s = delay_s
        await asyncio.sleep(3.0)
    for pipe in machines.pipes:
        pipe.delay_s = 0.0


async def broken_connection(machines: Machines) -> None:
    for _ in range(20):
        for pipe in machines.pipes:
            pipe.cut()
        await asyncio.sleep(machines.chance.uniform(0.05, 0.4))


# --- messages ---


async def sent_again(machines: Machines) -> None:
    """What is loaded already is stored once more, since the cluster has forgotten its id."""
    lane = machines.chance.choice(LANES)
    stream, subjects = f"{machines.prefix}_{lane}", f"{machines.prefix}.{lane}.*"
    async with machines.cluster.client() as client:
        taken = await client.subscribe(subjects)
        messages = [await taken.next_msg(30) for _ in range(10)]
        await taken.unsubscribe()
        async with _forgetful(client, stream):
            for message in messages:
                await until(lambda each=message: _stored(client, each), 30, "a second copy")


@asynccontextmanager
async def _forgetful(client: Any, stream: str) -> AsyncIterator[None]:
    """The stream knows ids for a tenth of a second."""
    config = (await request(client, f"STREAM.INFO.{stream}", {}))["config"]
    usual = config["duplicate_window"]
    await request(client, f"STREAM.UPDATE.{stream}", config | {"duplicate_window": 100_000_000})
    try:
        yield
    finally:
        config["duplicate_window"] = usual
        await request(client, f"STREAM.UPDATE.{stream}", config)


async def _stored(client: Any, message: Any) -> bool:
    try:
        answer = await client.jetstream().publish(
            message.subject, message.data, headers=message.headers, timeout=2
        )
    except (Error, APIError):
        return False
    return not answer.duplicate


# --- the database ---


async def database_restarted(machines: Machines) -> None:
    how = machines.chance.choice([signal.SIGINT, signal.SIGQUIT])
    await asyncio.to_thread(machines.postgres.stop, how)
    await asyncio.sleep(machines.chance.uniform(0.0, 3.0))
    await asyncio.to_thread(machines.postgres.start)


def database_lost(moment: Moment) -> Fault:
    """The connection to it breaks, again and again."""

    async def fault(machines: Machines) -> None:
        for _ in range(4):
            _, proxy = machines.any_service()
            await proxy.at(moment, cut, 40)

    return fault


async def database_and_leader(machines: Machines) -> None:
    """Both at once."""
    node = await machines.leader()
    await asyncio.to_thread(machines.postgres.stop, signal.SIGQUIT)
    await asyncio.to_thread(node.kill)
    await machines.goes_on()
    await asyncio.to_thread(machines.postgres.start)
    await machines.start_nodes()


PROCESS: dict[str, Fault] = {
    "a process killed": killed(None),
    "a process killed in the middle of COPY": killed(Moment.COPY),
    "a process killed between COMMIT and its answer": killed(Moment.COMMITTED),
    "a process killed while it acknowledges": killed(Moment.TOLD),
    "a process frozen": frozen(None),
    "a process frozen with what it took": frozen(Moment.LEDGER),
    "a process frozen in the middle of COPY": frozen(Moment.COPY),
    "a process frozen between COMMIT and its answer": frozen(Moment.COMMITTED),
    "a process frozen while it acknowledges": frozen(Moment.TOLD),
}
NODES: dict[str, Fault] = {
    "a stream's leader killed": leader(_killed),
    "a stream's leader stopped": leader(_terminated),
    "a stream's leader frozen": leader(_frozen),
    "a follower killed": follower(_killed),
    "a follower stopped": follower(_terminated),
    "a follower frozen": follower(_frozen),
    "two of three nodes killed": two_down,
    "all nodes killed": all_down,
}
BETWEEN: dict[str, Fault] = {
    "a slow connection to the cluster": slow_connection,
    "a broken connection to the cluster": broken_connection,
    "PostgreSQL restarted": database_restarted,
}


async def _run(fault: Fault, machines: Machines) -> None:
    await fault(machines)


async def three_at_once(machines: Machines) -> None:
    """To a process, to the nodes and in between."""
    async with asyncio.TaskGroup() as together:
        for faults in (PROCESS, NODES, BETWEEN):
            name = machines.chance.choice(list(faults))
            print(name, file=sys.stderr)
            together.create_task(_run(faults[name], machines))


FAULTS: dict[str, Fault] = (
    PROCESS | NODES | BETWEEN
    | {
        "messages stored a second time": sent_again,
        "the connection to PostgreSQL broken in the middle of COPY": database_lost(Moment.COPY),
        "the connection to PostgreSQL broken before COMMIT is answered": database_lost(
            Moment.COMMITTED
        ),
        "PostgreSQL and a leader killed at once": database_and_leader,
        "three of these at once": three_at_once,
    }
)  # fmt: skip
# on hosts and disks of their own
FAULTS_APART: dict[str, Fault] = {
    "the disk of a stream's leader full": leader(_full),
    "the disk of a follower full": follower(_full),
    "a stream's leader cut off": leader(_cut_off),
    "a follower cut off": follower(_cut_off),
    "a stream's leader cut off from the other nodes": leader(_parted),
    "a power cut of all nodes": power_lost,
}


def drawn(chance: random.Random, count: int, faults: dict[str, Fault]) -> list[str]:
    """So many, each kind as often as the others, in any order."""
    names: list[str] = []
    while len(names) < count:
        names += chance.sample(list(faults), len(faults))
    return names[:count]
