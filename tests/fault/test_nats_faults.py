"""Processes on several machines with one NATS cluster: whatever fails, each event is in once."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fault.machines import Machines, MakeService
from tests.fault.nats_faults import FAULTS, drawn
from tests.postgres import Postgres

COUNT = int(os.environ.get("FAULT_COUNT") or 10)


@pytest.fixture
async def machines(
    own_postgres: Postgres, make_service: MakeService, tmp_path: Path, seed: int
) -> AsyncIterator[Machines]:
    chance = random.Random(seed)
    async with Machines.running(tmp_path, own_postgres, make_service, chance) as machines:
        yield machines


async def test_faults_at_random(machines: Machines) -> None:
    for name in drawn(machines.chance, COUNT, FAULTS):
        print(name)
        print(await machines.round(FAULTS[name]))
