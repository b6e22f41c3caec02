"""Fixtures of the fault tests: a seed that is told on failure, databases, and a proxy."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.databases import KINDS, Server, running
from tests.fault.moments import Moments
from tests.fault.proxy import Proxy, moments_of


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


@pytest.fixture(params=KINDS)
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind for one test, to be hurt."""
    with running(request.param) as server:
        yield server


@pytest.fixture(params=KINDS)
def any_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new, empty database of each kind, of a server that others use, too."""
    if request.param == "sqlite":
        with running("sqlite") as files:
            yield files.create_database()
    else:
        yield request.getfixturevalue(request.param).create_database()


@pytest.fixture
async def moments(any_database: str) -> AsyncIterator[Moments]:
    """What tells the moments of loads into it."""
    async with moments_of(any_database) as running_moments:
        yield running_moments
