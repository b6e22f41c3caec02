"""Of several addresses in a database URL the one that answers is found."""

from __future__ import annotations

from collections.abc import Callable

from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import Service


async def test_the_first_address_refuses(
    make_service: Callable[..., Service], database: str, postgres: Postgres
) -> None:
    name = database.rpartition("/")[2]
    url = f"postgresql://postgres@127.0.0.1:{free_port()},127.0.0.1:{postgres.port}/{name}"
    service = await make_service(database_url=url).start()
    await service.post({"event_name": "install", "user_id": 1, "timestamp": 1})
    books = await service.drained()
    assert (books["loaded"], books["balanced"]) == (1, True)
