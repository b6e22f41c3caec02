"""A machine of one's own: supervisord keeps four processes on one port."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import aiohttp

from tests.deploy.supervisor import PROCESSES, Supervisor
from tests.fault.driver import Driver
from tests.service import until


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
            await asyncio.to_thread(kill_with_events, victim)

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


def kill_with_events(pid: int) -> None:
    """SIGKILL, at a moment at which its journal holds events that somebody has to recover."""
    opened = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
    (journal,) = (name for name in opened if name.endswith(".sqlite"))
    for _ in range(1000):
        os.kill(pid, signal.SIGSTOP)
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as look:
            if look.execute("SELECT count(*) FROM segments").fetchone() > (0,):
                break
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    else:
        raise AssertionError("nothing ever waited")
    os.kill(pid, signal.SIGKILL)


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
