"""Fixtures that many tests share: a PostgreSQL server, databases in it, services."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.jetstream import NatsCluster
from tests.mariadb import MariaDB
from tests.postgres import Postgres
from tests.service import Service, made

# folders with the files that take long, which start first: one that starts last runs alone
LONG_FIRST = ("deploy", "fault", "browser", "integration", "docs", "contract", "unit")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What pytest compiles is kept for the next run, though the processes of tests keep nothing."""
    told, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = told


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files, in an order that keeps all workers busy; within a file nothing moves."""
    here = Path(__file__).parent
    order = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(here).parts[0], len(order)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What needs root and has none is named and fails the run: nothing is skipped in silence."""
    needing = [item.nodeid for item in session.items if item.get_closest_marker("needs_root")]
    if needing and os.geteuid() != 0:
        pytest.exit(f"these tests need root: {', '.join(needing)}", returncode=1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server for the whole run; tests that stop or freeze one take `own_postgres`."""
    with Postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def postgres13() -> Iterator[Postgres]:
    """The oldest that we promise."""
    with Postgres.running(version="13") as server:
        yield server


@pytest.fixture(scope="session")
def postgres18() -> Iterator[Postgres]:
    """The newest."""
    with Postgres.running(version="18") as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server for one test, to be hurt."""
    with Postgres.running(fsync="on") as server:
        yield server


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The URL of a new, empty database."""
    return postgres.create_database()


@pytest.fixture(scope="module")
def database_url(postgres: Postgres) -> str:
    """The URL of a database for the service that a module's tests share."""
    return postgres.create_database()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A server for the whole run, as fast as one that flushes nothing."""
    with MariaDB.running(innodb_flush_method="nosync") as server:
        yield server


@pytest.fixture
def own_mariadb() -> Iterator[MariaDB]:
    """A server for one test, to be hurt."""
    with MariaDB.running() as server:
        yield server


@pytest.fixture
def mysql_database(mariadb: MariaDB) -> str:
    """The URL of a new, empty database."""
    return mariadb.create_database()


@pytest.fixture(scope="session")
def nats_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """A NATS server alone, for the whole run; whoever stores in it takes `nats_prefix`, too."""
    with NatsCluster.running(tmp_path_factory.mktemp("nats"), 1) as alone:
        yield alone


@pytest.fixture(scope="session")
def nats_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """Three that replicate, for the whole run; tests that hurt one take `own_nats`."""
    with NatsCluster.running(tmp_path_factory.mktemp("nats")) as cluster:
        yield cluster


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsCluster]:
    """Three NATS servers for one test, to be hurt."""
    with NatsCluster.running(tmp_path / "nats") as cluster:
        yield cluster


@pytest.fixture
async def nats_prefix(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A prefix that no other test has; its streams are deleted from the shared servers."""
    prefix = f"t{uuid4().hex[:12]}"
    yield prefix
    for name in {"nats_node", "nats_cluster"} & set(request.fixturenames):
        await request.getfixturevalue(name).delete_streams(prefix)


@pytest.fixture
async def make_service(tmp_path: Path) -> AsyncIterator[Callable[..., Service]]:
    """See `tests.service.made`."""
    async with made(tmp_path) as make:
        yield make
