"""A rolling restart under load, of all processes and then of all nodes: only 200 and 503."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.fault.machines import Machines, MakeService
from tests.postgres import Postgres


async def test_all_processes_and_then_all_nodes_one_by_one(
    postgres: Postgres, make_service: MakeService, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    async with Machines.running(tmp_path, postgres, make_service, chance) as machines:
        print("processes", await machines.round(_processes))
        print("nodes", await machines.round(_nodes))
        assert set(machines.driver.statuses) <= {200, 202, 503}, machines.driver.statuses
        assert not machines.driver.torn


async def _processes(machines: Machines) -> None:
    """As a load balancer does it: no more requests, then SIGTERM."""
    for service in machines.services:
        machines.away.add(service)
        assert await service.stop() == 0
        machines.away.discard(service)
        await service.start()
        await machines.goes_on()


async def _nodes(machines: Machines) -> None:
    for node in machines.cluster.nodes:
        await asyncio.to_thread(node.restart)
        await machines.caught_up()
        await machines.goes_on()
