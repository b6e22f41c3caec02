"""Peers: the other processes that share this `data_dir`; together they appear as one.

Each listens on a socket in `data_dir/peers`, and answers there for itself alone, so that nobody
asks in circles. Who can open the socket could read the journals, too: it needs no key.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import structlog
from aiohttp import web

_ANSWER_S = 2.0  # a peer that takes longer is left out
_LONGEST_PATH = 100  # bytes; sun_path holds 108 on Linux, 104 elsewhere

log = structlog.stdlib.get_logger("datapipe.monitor.peers")


class Peers:
    """Finds the living peers and asks them; none are there with a `data_dir` of one's own."""

    def __init__(self, data_dir: Path, process: str) -> None:
        self._folder = data_dir / "peers"
        self._own = f"{process}.sock"

    @asynccontextmanager
    async def listening(
        self,
        status: Callable[[], Awaitable[Mapping[str, Any]]],
        load: Callable[[str | None, bool], Awaitable[Mapping[str, Any]]],
    ) -> AsyncIterator[None]:
        """Answer the others; where that can't be, they only see less.

        Args:
            status: what this process shows of itself.
            load: load now: one lane or all; whether to accept dead letters.
        """

        async def show(request: web.Request) -> web.Response:
            body = msgspec.json.encode(await status())
            return web.Response(body=body, content_type="application/json")

        async def load_now(request: web.Request) -> web.Response:
            query = request.query
            return web.json_response(await load(query.get("lane"), query.get("accept") == "dead"))

        app = web.Application()
        app.router.add_get("/status.json", show)
        app.router.add_post("/load", load_now)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(runner.cleanup)
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = self._path(stack)
                await web.UnixSite(runner, path).start()
                stack.callback(_unlink, Path(path))
            except OSError as exc:
                log.warning("peers can't see this process", error=str(exc))
            yield

    def _path(self, stack: contextlib.AsyncExitStack) -> str:
        """A path short enough for a socket; where the folder's is not, a link leads there."""
        link = self._folder / self._own
        if len(os.fsencode(link)) <= _LONGEST_PATH:
            return str(link)
        short = tempfile.mkdtemp(prefix="datapipe-")
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        link.symlink_to(Path(short) / "s")
        stack.callback(_unlink, link)
        return str(Path(short) / "s")

    async def ask(self, method: str, path: str) -> list[dict[str, Any]]:
        """The JSON answers of all living peers; what a dead one left behind is removed."""
        try:
            others = [p for p in sorted(self._folder.glob("*.sock")) if p.name != self._own]
        except OSError as exc:  # no open file is left
            log.warning("a peer does not answer", error=str(exc))
            return []
        answers = await asyncio.gather(*(self._ask(other, method, path) for other in others))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, socket: Path, method: str, path: str) -> dict[str, Any] | None:
        timeout = aiohttp.ClientTimeout(total=None if method == "POST" else _ANSWER_S)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(_where(socket)), timeout=timeout
                ) as session,
                session.request(method, f"http://peer{path}") as response,
            ):
                if response.status != 200:
                    return None
                answer: dict[str, Any] = msgspec.json.decode(await response.read())
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as exc:
            cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
            if isinstance(cause, ConnectionRefusedError | FileNotFoundError):
                _unlink(socket)  # nobody listens: its process has ended
                return None
            log.warning("a peer does not answer", error=f"{type(exc).__name__}: {exc}")
        return None


def _where(socket: Path) -> str:
    return str(socket.readlink()) if socket.is_symlink() else str(socket)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
