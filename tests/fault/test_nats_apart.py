"""Nodes on hosts and disks of their own: partitions, full disks, a power cut of all."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fault.machines import Machines, MakeService
from tests.fault.nats_faults import FAULTS_APART
from tests.postgres import Postgres

# the others are in the long run, `python -m tests.fault.torture nats`
SOME = (
    "a power cut of all nodes", "a stream's leader cut off from the other nodes",
    "the disk of a stream's leader full",
)  # fmt: skip


@pytest.fixture
async def machines(
    postgres: Postgres, make_service: MakeService, tmp_path: Path, seed: int
) -> AsyncIterator[Machines]:
    chance = random.Random(seed)
    async with Machines.running(tmp_path, postgres, make_service, chance, apart=True) as machines:
        yield machines


@pytest.mark.needs_root
async def test_partitions_full_disks_and_power_cuts(machines: Machines) -> None:
    for name in SOME:
        print(name, await machines.round(FAULTS_APART[name]))
