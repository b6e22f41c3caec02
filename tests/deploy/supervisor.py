"""supervisord, which keeps processes on one port."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.deploy.shipped import installed, moved, status_of
from tests.ports import free_port

PROCESSES = 4


class Supervisor:
    """supervisord with a file that is shipped; `ctl` asks it.

    Args: name: of the file in deploy/. processes: as many as it starts.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "supervisord.conf",
        processes: int = PROCESSES,
        **settings: Any,
    ) -> None:
        self.processes = processes
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.logs = folder / "log"
        for each in ("log", "run"):
            (folder / each).mkdir()
        self._file = moved(
            name, folder,
            {
                "/opt/datapipe": installed(folder), "/var/log/datapipe": str(self.logs),
                "/run/datapipe": str(folder / "run"), "/var/lib/datapipe": str(folder / "var"),
                "user=datapipe\n": "", "startsecs=5": "startsecs=1",
                "50MB": "4KB", "backups=10": "backups=99",
            },
        )  # fmt: skip
        cnf = folder / "datapipe.json"
        cnf.write_text(json.dumps({"host": "127.0.0.1", "port": self.port, **settings}))
        self._env = {"PATH": os.environ["PATH"], "DATAPIPE_CNF": str(cnf), "LANG": "C.UTF-8"}
        self._process: asyncio.subprocess.Process

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Supervisor]:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self._file),
            env=self._env, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield self
        finally:
            if self._process.returncode is None:
                assert await self.stop() == 0

    async def stop(self) -> int:
        """As `systemctl stop supervisor` would; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            return await self._process.wait()

    async def ctl(self, *args: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self._file), *args,
            env=self._env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        return (await asyncio.wait_for(process.communicate(), 30))[0].decode()

    async def pids(self) -> dict[str, int]:
        """The processes that run, by name."""
        words = [line.split() for line in (await self.ctl("status")).splitlines()]
        return {w[0]: int(w[3].rstrip(",")) for w in words if w[1] == "RUNNING"}

    async def up(self) -> bool:
        """Whether all run, and listen, and are on the page, with nobody else."""
        try:
            found = await self.status()
        except aiohttp.ClientError:
            return False
        return found["processes"] == self.processes and await self.listening()

    async def listening(self) -> bool:
        """Whether all run, and listen."""
        listening = {line["pid"] for line in self.lines() if line["event"] == "listening"}
        running = set((await self.pids()).values())
        return len(running) == self.processes and running <= listening

    async def status(self) -> dict[str, Any]:
        return await status_of(self.url)

    def lines(self) -> list[dict[str, Any]]:
        """The log of all processes, with what was rotated away; each line is JSON."""
        found = []
        for number in range(self.processes):
            kept = sorted(
                self.logs.glob(f"{number}.log*"),
                key=lambda path: int(path.suffix[1:]) if path.suffix != ".log" else 0,
                reverse=True,
            )
            text = "".join(path.read_text() for path in kept)
            found += [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        return found
