"""A short run of what `make torture` does for longer."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fault.changes import change
from tests.service import Service


async def test_what_was_answered_is_somewhere_once_whatever_changes(
    make_service: Callable[..., Service], database: str, seed: int
) -> None:
    found = await change(database, make_service, random.Random(seed), 8)
    found.check()
    assert found.rows > 500
    assert found.waited
    assert found.reused
