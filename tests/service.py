"""datapipe as its users run it: a process of its own, told by a settings file, asked by HTTP."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp

from tests.zygote import ROOT, Forked, Zygote, can_fork

LINE_BYTES = 16 << 20


@cache
def zygote() -> Zygote:
    """This process's own."""
    made = Zygote()
    atexit.register(made.end)
    return made


async def until(
    holds: Callable[[], Awaitable[bool]], timeout_s: float = 30.0, what: str = "it"
) -> None:
    """Wait for something to become true; AssertionError if it does not."""
    async with asyncio.timeout(timeout_s):
        try:
            while not await holds():
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            raise AssertionError(f"{what} did not come true in {timeout_s} s") from None


@asynccontextmanager
async def made(folder: Path) -> AsyncIterator[Callable[..., Service]]:
    """Makes services, not yet started; whatever still runs in the end is killed."""
    services: list[Service] = []

    def make(**settings: Any) -> Service:
        service = Service(folder, **settings)
        services.append(service)
        return service

    async with AsyncExitStack() as stack:
        yield make
        for service in services:
            stack.push_async_callback(service.close)
            if service._process is not None and service._process.returncode is None:
                stack.push_async_callback(service.kill)


class Service:
    """One `datapipe serve`. Its log lines are in `lines`, parsed.

    Args:
        settings: over defaults that suit tests (loopback, a free port, its own data_dir).
        inside: words before the command, which run it elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        env: dict[str, str] | None = None,
        inside: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.settings = {
            "host": "127.0.0.1", "port": 0, "data_dir": str(folder / "var"),
            "load_interval": 0.5, "load_min_interval": 0.1, **settings,
        }  # fmt: skip
        self.file = folder / f"datapipe-{id(self)}.json"
        self._env = env or {}
        self._inside = inside
        self._process: asyncio.subprocess.Process | Forked | None = None
        self._reader: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self.url = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
            )
        return self._session

    async def start(self, *, wait: bool = True) -> Service:
        """Start the process; returns once it listens."""
        self.file.write_text(json.dumps(self.settings))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("DATAPIPE_", "IRON_"))}
        for name in ("PORT", "DATABASE_URL", "DYNO"):
            env.pop(name, None)
        env |= {"DATAPIPE_CNF": str(self.file), "PYTHONPATH": str(ROOT), **self._env}
        self.url = ""
        if can_fork(self._env) and not self._inside:
            self._process = await zygote().start(["serve"], env, self.file.parent, LINE_BYTES)
        else:
            self._process = await asyncio.create_subprocess_exec(
                *self._inside, sys.executable, "-m", "datapipe", "serve", env=env,
                limit=LINE_BYTES,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                start_new_session=True, cwd=self.file.parent,
            )  # fmt: skip
        self._reader = asyncio.create_task(self._read(self._process))
        if wait:
            await until(self._listens, what="listening")
        return self

    async def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None or self.url, "\n".join(self.raw)
        return bool(self.url)

    async def _read(self, process: asyncio.subprocess.Process | Forked) -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            text = raw.decode().rstrip("\n")
            self.raw.append(text)
            try:
                line = json.loads(text)
            except ValueError:
                continue
            self.lines.append(line)
            if line.get("event") == "listening":
                self.url = line["address"]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == event]

    def send_signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code, once it has ended."""
        assert self._process is not None
        async with asyncio.timeout(timeout_s):
            code = await self._process.wait()
        assert self._reader is not None
        await self._reader
        return code

    async def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal and wait for the end; the exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        code = await self.wait(timeout_s)
        await self.close()
        return code

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, body: object, **more: Any) -> tuple[int, dict[str, Any]]:
        """POST / with bytes, text or something to be made JSON; status and answer."""
        data = body if isinstance(body, bytes | str) else json.dumps(body)
        async with self.session.post(f"{self.url}/", data=data, **more) as response:
            return response.status, await response.json()

    async def get(self, path: str, **more: Any) -> tuple[int, dict[str, Any]]:
        async with self.session.get(f"{self.url}{path}", **more) as response:
            return response.status, await response.json()

    async def status(self) -> dict[str, Any]:
        return (await self.get("/status.json"))[1]

    async def load(self, query: str = "") -> dict[str, Any]:
        async with self.session.post(f"{self.url}/load{query}") as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def drained(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until nothing waits; the books."""

        async def empty() -> bool:
            return bool((await self.status())["books"]["waiting"] == 0)

        await until(empty, timeout_s, "an empty buffer")
        books: dict[str, Any] = (await self.status())["books"]
        return books
