"""nginx in front, with the file that is shipped."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.deploy.nginx import nginx
from tests.service import Service

EVENT = {"event_name": "install", "user_id": 1, "timestamp": 1}


@asynccontextmanager
async def client_of(folder: Path, service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    """A session of clients that come by way of it, from anywhere."""
    places = {
        "127.0.0.1:8080": service.url.removeprefix("http://"), "/var/log/nginx": str(folder),
        "rate=100r/s": "rate=1r/s",  # so that no machine is too slow to reach it
    }  # fmt: skip
    async with nginx(folder, "nginx.conf", places) as (base, trusting):
        connector = aiohttp.TCPConnector(ssl=trusting, limit=0)
        async with aiohttp.ClientSession(base, connector=connector) as session:
            yield session


async def test_what_comes_through(
    make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    service = await make_service(database_url=database, ingest_keys=["s3cret"]).start()
    async with client_of(tmp_path, service) as client:
        async with client.post("/?key=s3cret", json=EVENT) as response:
            assert response.status == 200
            id = response.headers["X-Request-ID"]
        async with client.post("/", data=io.BytesIO(bytes(8 * 2**20 + 1))) as response:
            assert response.status == 413
        async with asyncio.timeout(10), client.get("/stream") as stream:  # as it is made
            assert b"data" in await stream.content.read(1000)
        # on loopback without an admin key: nobody from outside may say that this is where they are
        async with client.post("/load", headers={"Host": "localhost"}) as response:
            assert response.status == 403

        async def post() -> int:
            async with client.post("/?key=s3cret", json=EVENT) as response:
                return response.status

        statuses: list[int] = []
        for _ in range(12):
            statuses += await asyncio.gather(*(post() for _ in range(40)))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 390, "a burst is cut short"
    log = (tmp_path / "datapipe.log").read_text()
    assert id in log
    assert "s3cret" not in log
