"""Fixtures of the fault tests: a seed that is told on failure, a proxy."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator

import pytest

from tests.fault.proxy import Proxy


@pytest.fixture
def seed() -> int:
    """Printed, so a failure shows it; FAULT_SEED repeats it."""
    value = int(os.environ.get("FAULT_SEED") or random.SystemRandom().getrandbits(32))
    print(f"FAULT_SEED={value}")
    return value


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    """A proxy before a new database."""
    async with Proxy(database).running() as running:
        yield running
