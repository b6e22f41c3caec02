"""A short run of what `make torture` does 100,000 times."""

from __future__ import annotations

import pytest

from tests.databases import SqliteFiles
from tests.fault.hostile import CORPUS, Run, run


@pytest.mark.parametrize(
    ("kind", "bodies"), [("postgres", 1500), ("mariadb", 300), ("sqlite", 300)]
)
def test_hostile_bodies_are_no_fault_and_cost_no_good_event(
    request: pytest.FixtureRequest, kind: str, bodies: int, seed: int
) -> None:
    """What was accepted fits into the database: none is a dead letter."""
    server = SqliteFiles() if kind == "sqlite" else request.getfixturevalue(kind)
    if kind == "sqlite":
        request.addfinalizer(server.remove)
    found = run(server, bodies, seed)
    assert found.bodies >= bodies * 2 // 3
    assert len(CORPUS) >= 40
    assert {200, 207, 400} <= set(found.statuses), found
    assert found.good > bodies // 10


async def test_a_fault_of_ours_would_be_seen() -> None:
    """The test above can fail."""
    from datapipe.http import responses as answers

    class Broken:
        ingest: Broken

        def take(self, *args: object) -> bool:
            return False

        async def answer(self, *args: object) -> answers.Answer:
            return answers.answer(500, 100, "internal server error")

    Broken.ingest = Broken()
    with pytest.raises(AssertionError, match="500"):
        await Run(Broken()).send(b"{}", "alone")  # type: ignore[arg-type]
