"""An older database is put back beside the journal of today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from tests.postgres import Postgres
from tests.service import Service


def install(user: int) -> dict[str, Any]:
    return {"event_name": "install", "user_id": user, "timestamp": 1}


async def test_what_waits_is_loaded_into_it_once_and_what_was_loaded_since_is_gone(
    postgres: Postgres, database: str, make_service: Callable[..., Service]
) -> None:
    service = make_service(database_url=database, load_interval=300)
    await service.start()
    await service.post(install(1), headers={"Idempotency-Key": "one"})
    assert (await service.load())["loaded"] == {"install": 1}
    await service.stop()
    backup = f"backup{uuid4().hex[:10]}"
    source = urlsplit(database).path.strip("/")
    postgres.execute(postgres.url("postgres"), f"CREATE DATABASE {backup} TEMPLATE {source}")

    await service.start()
    await service.post(install(2), headers={"Idempotency-Key": "two"})
    assert (await service.load())["loaded"] == {"install": 1}
    await service.post(install(3))
    await service.kill()

    service.settings["database_url"] = restored = postgres.url(backup)
    await service.start()
    books = await service.drained()
    assert (books["recovered"], books["loaded"], books["balanced"]) == (1, 1, True)
    rows = "SELECT user_id FROM install ORDER BY 1"
    assert postgres.execute(restored, rows) == [(1,), (3,)]

    # the keys of events that are gone are, too: who sends again has them back
    for user, key in ((1, "one"), (2, "two")):
        assert (await service.post(install(user), headers={"Idempotency-Key": key}))[0] == 200
    await service.load()
    assert (await service.drained())["duplicate"] == 1
    assert postgres.execute(restored, rows) == [(1,), (2,), (3,)]
