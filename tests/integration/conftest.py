"""What several files of tests against real servers ask for."""

from __future__ import annotations

import pytest

from tests.jetstream import NatsCluster


@pytest.fixture(params=["nats_node", "nats_cluster"])
def cluster(request: pytest.FixtureRequest) -> NatsCluster:
    """One server alone, and three that replicate."""
    found: NatsCluster = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def prefix(cluster: NatsCluster, nats_prefix: str) -> str:
    """A new one; asked for after the servers, for its streams are deleted before they end."""
    return nats_prefix
