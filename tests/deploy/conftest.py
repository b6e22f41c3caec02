"""Fixtures of the deployment tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.environment import locked_environment, slug
from tests.deploy.heroku import Build
from tests.deploy.tls import TlsPostgres
from tests.fault.conftest import seed

__all__ = ["seed"]


@pytest.fixture(scope="session")
def locked() -> Path:
    """The environment that requirements.txt makes."""
    return locked_environment()


@pytest.fixture(scope="module")
def build(locked: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """What one push makes of this tree, for all dynos."""
    files = tmp_path_factory.mktemp("slug")
    slug(files)
    return Build(locked, files)


@pytest.fixture
def tls_postgres() -> Iterator[TlsPostgres]:
    """A server that takes no connection of an app without TLS."""
    server = TlsPostgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()
