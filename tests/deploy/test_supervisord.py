"""A machine of one's own: supervisord keeps four processes on one port."""

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
from tests.fault.driver import Driver
from tests.postgres import free_port
from tests.service import until

PROCESSES = 4


class Supervisor:
    """supervisord with the file that is shipped; `ctl` asks it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.logs = folder / "log"
        for name in ("log", "run"):
            (folder / name).mkdir()
        self._file = moved(
            "supervisord.conf", folder,
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
        """Whether all run, and listen."""
        try:
            found = await self.status()
        except aiohttp.ClientError:
            return False
        listening = [line["pid"] for line in self.lines() if line["event"] == "listening"]
        running = set((await self.pids()).values())
        return found["processes"] == PROCESSES and running <= set(listening)

    async def status(self) -> dict[str, Any]:
        return await status_of(self.url)

    def lines(self) -> list[dict[str, Any]]:
        """The log of all processes, with what was rotated away; each line is JSON."""
        found = []
        for number in range(PROCESSES):
            kept = sorted(
                self.logs.glob(f"{number}.log*"),
                key=lambda path: int(path.suffix[1:]) if path.suffix != ".log" else 0,
                reverse=True,
            )
            text = "".join(path.read_text() for path in kept)
            found += [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        return found


async def test_four_processes_one_of_them_killed(database: str, tmp_path: Path, seed: int) -> None:
    settings = {
        "database_url": database, "load_interval": 3600, "load_min_interval": 0, "load_workers": 1,
        "load_trigger_bytes": 4000,  # loads often, and yet something waits at any moment
        "event_modules": ["tests.fault.modules.quick_recovery"],
    }  # fmt: skip
    async with Supervisor(tmp_path, **settings).running() as supervisor:
        await until(supervisor.up, what="four processes that run")
        driver = Driver(lambda: supervisor.url, seed, connections=48)  # some for each process

        async def rotated() -> bool:
            return len(list(supervisor.logs.glob("?.log.1"))) == PROCESSES

        async with driver.running():
            await driver.answered(200)
            await until(rotated, 60, "a log of each process that was rotated")
            victim = (await supervisor.pids())["datapipe:2"]
            os.kill(victim, signal.SIGKILL)

            async def replaced() -> bool:
                pids = await supervisor.pids()
                return pids.get("datapipe:2", victim) != victim and await supervisor.up()

            await until(replaced, what="the killed process")
            await driver.answered(200)
        await driver.settle()
        assert await supervisor.stop() == 0
    verdict = await driver.check(database)
    lines = supervisor.lines()
    print(f"{verdict.answered} events answered, {len(verdict.lost)} lost, {len(lines)} log lines")
    assert len([line for line in lines if line["event"] == "listening"]) == PROCESSES + 1
    assert len([line for line in lines if line["event"] == "stopped"]) == PROCESSES
    assert [line for line in lines if line["event"] == "recovered"]
    told = (supervisor.logs / "supervisord.log").read_text()
    assert told.count("stopped: ") == told.count("(exit status 0)") == PROCESSES, told


async def test_load_now_reaches_all(database: str, tmp_path: Path) -> None:
    async with Supervisor(
        tmp_path, database_url=database, load_interval=3600
    ).running() as supervisor:
        await until(supervisor.up, what="four processes that run")
        connector = aiohttp.TCPConnector(force_close=True)  # each POST to whoever takes it
        async with aiohttp.ClientSession(connector=connector) as session:
            event = {"event_name": "install", "user_id": 1, "timestamp": 1}
            for _ in range(40):
                async with session.post(f"{supervisor.url}/", json=event) as response:
                    assert response.status == 200
            found = await supervisor.status()
            assert (found["processes"], found["books"]["waiting"]) == (PROCESSES, 40)
            async with session.post(f"{supervisor.url}/load") as response:
                assert await response.json() == {"loaded": {"install": 40}, "failed": {}}
            assert (await supervisor.status())["books"]["waiting"] == 0


async def test_a_wrong_setting_is_not_tried_for_ever(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, load_intervall=1).running() as supervisor:

        async def given_up() -> bool:
            told = await supervisor.ctl("status")
            return told.count("EXITED") + told.count("FATAL") == PROCESSES

        await until(given_up, what="no more tries")
    text = (supervisor.logs / "0.log").read_text()
    assert "load_intervall: no such setting" in text
    assert "Traceback" not in text
