"""The platform, as its pages tell: runs the Procfile's lines, one dyno each.

A dyno has a disk of its own, a copy of the slug, that is thrown away with it; the
platform's variables and no others; 512 MB. It is sent SIGTERM, and SIGKILL 30 s later. Its lines
are run by honcho, in an environment made from requirements.txt alone.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.processes import rss_bytes, send, tree

MEMORY_BYTES = 512 * 2**20
BOOT_S, STOP_S = 60.0, 30.0
_HONCHO = [sys.executable, "-m", "honcho", "--no-colour", "start"]


@dataclass(frozen=True)
class Build:
    """An environment, and a folder with the files of a push."""

    venv: Path
    slug: Path


class Dyno:
    """One run of one line of the Procfile.

    Attributes:
        lines: of its log, parsed. code: the exit code of the line's own process.
        peak_bytes: of its memory, honcho's included.
    """

    def __init__(self, kind: str, build: Build, config: Mapping[str, str], port: int) -> None:
        self.kind = kind
        self.disk = Path(tempfile.mkdtemp(prefix="datapipe-dyno-", dir="/var/tmp"))
        shutil.copytree(build.slug, self.disk, dirs_exist_ok=True)
        self.env = {
            **config, "DYNO": f"{kind}.1", "PORT": str(port), "HOME": str(self.disk),
            "PATH": f"{build.venv / 'bin'}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "true",
        }  # fmt: skip
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self.code: int | None = None
        self.pid = 0
        self.peak_bytes = 0
        self._process: asyncio.subprocess.Process
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        limit = f'ulimit -d {MEMORY_BYTES // 1024} && exec "$@"'
        self._process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", limit, "dyno", *_HONCHO, self.kind, cwd=self.disk, env=self.env,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True, limit=2**24,
        )  # fmt: skip
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            text = raw.decode().rstrip("\n").partition(" | ")[2]
            self.raw.append(text)
            if text.startswith("{"):
                self.lines.append(json.loads(text))
            elif started := re.search(r"started \(pid=(\d+)\)", text):
                self.pid = int(started[1])
            elif stopped := re.search(r"stopped \(rc=(-?\d+)\)", text):
                self.code = int(stopped[1])

    async def _watch(self) -> None:
        """Note what memory it has; end it above the limit."""
        while self._process.returncode is None:
            pids = tree(self._process.pid)
            self.peak_bytes = max(self.peak_bytes, rss_bytes(pids))
            if self.peak_bytes > MEMORY_BYTES:
                send(pids, signal.SIGKILL)
            await asyncio.sleep(0.1)

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == event]

    async def listens(self, port: int) -> float:
        """Wait for its port to open; seconds. AssertionError: not in 60 s, or it ended."""
        began = time.monotonic()
        while time.monotonic() - began < BOOT_S:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return time.monotonic() - began
            assert self._process.returncode is None, self.raw
            await asyncio.sleep(0.05)
        raise AssertionError("the port did not open in 60 s")

    async def ended(self, timeout_s: float) -> int | None:
        """Its exit code once it has ended by itself; its disk is gone then."""
        async with asyncio.timeout(timeout_s):
            await self._process.wait()
        await self._gone()
        return self.code

    async def stop(self, patience_s: float = STOP_S) -> float:
        """SIGTERM, and SIGKILL to what then still runs; the seconds that it took."""
        began = time.monotonic()
        pids = tree(self._process.pid)
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(patience_s):
                await self._process.wait()
        except TimeoutError:
            send(pids, signal.SIGKILL)
        took = time.monotonic() - began
        await self._gone()
        return took

    async def crash(self) -> None:
        """The machine is gone: no signal is heard."""
        send(tree(self._process.pid), signal.SIGKILL)
        await self._gone()

    async def _gone(self) -> None:
        await self._process.wait()
        await asyncio.gather(*self._tasks)
        shutil.rmtree(self.disk)


class App:
    """An app of one web dyno. `config` are its variables: those of its add-ons, and the owner's."""

    def __init__(self, build: Build, config: Mapping[str, str], port: int) -> None:
        self.config = dict(config)
        self.port = port
        self.dynos: list[Dyno] = []
        self._build = build

    @property
    def web(self) -> Dyno:
        return self.dynos[-1]

    async def release(self, **changed: str) -> tuple[int | None, str]:
        """Run the release line: its exit code and what it said."""
        dyno = Dyno("release", self._build, self.config | changed, self.port)
        await dyno.start()
        try:
            code = await dyno.ended(60)
        except TimeoutError:
            await dyno.crash()
            raise
        return code, "\n".join(dyno.raw)

    async def start(self) -> float:
        """Start the web dyno on a new disk; seconds until its port is open."""
        dyno = Dyno("web", self._build, self.config, self.port)
        await dyno.start()
        self.dynos.append(dyno)
        return await dyno.listens(self.port)
