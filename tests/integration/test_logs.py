"""Who reads the log may stop reading, or go: the service goes on."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.ports import free_port
from tests.service import ROOT, until
from tests.wire import crash

F_SETPIPE_SZ = 1031  # Source: Linux, include/uapi/linux/fcntl.h
CHATTY = "tests.fault.modules.chatty"


class Logging:
    """A service whose standard output is a pipe that is read when the test wants it."""

    def __init__(self, folder: Path, database: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._file = folder / "datapipe.json"
        self._file.write_text(
            json.dumps({
                "host": "127.0.0.1", "port": int(self.url.rpartition(":")[2]),
                "data_dir": str(folder / "var"), "database_url": database, "load_interval": 0.1,
                "load_min_interval": 0.1, "event_modules": [CHATTY],
            })
        )  # fmt: skip
        self.out, self._in = os.pipe()
        fcntl.fcntl(self._in, F_SETPIPE_SZ, 4096)
        self._pipe = os.fdopen(self.out, "rb", closefd=False)
        self._session: aiohttp.ClientSession
        self.process: asyncio.subprocess.Process

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Logging]:
        env = {"PATH": os.environ["PATH"], "DATAPIPE_CNF": str(self._file), "PYTHONPATH": str(ROOT)}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "datapipe", "serve", env=env, cwd=self._file.parent,
            stdout=self._in, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(self._in)
        timeout = aiohttp.ClientTimeout(total=15)
        async with aiohttp.ClientSession(timeout=timeout) as self._session:
            try:
                await until(self._answers, what="an answer")
                yield self
            finally:
                if self.process.returncode is None:
                    self.process.kill()
                    await self.process.wait()

    async def _answers(self) -> bool:
        try:
            async with self._session.get(f"{self.url}/healthz") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def post(self, count: int = 1) -> None:
        for _ in range(count):
            async with self._session.post(f"{self.url}/", json=crash()) as response:
                assert response.status == 200

    def chat(self) -> None:
        """Have the service log five thousand lines, numbered."""
        self.process.send_signal(signal.SIGUSR1)

    async def lines(self, last: str = "") -> list[dict[str, Any]]:
        """What comes out of the pipe, up to a line of this event, or until the service ends."""

        def read() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            for line in self._pipe:
                found.append(json.loads(line))
                if found[-1]["event"] == last:
                    return found
            os.close(self.out)
            return found

        return await asyncio.to_thread(read)

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            return await self.process.wait()


async def test_posts_go_on_while_nobody_reads_the_log(database: str, tmp_path: Path) -> None:
    """Dropped lines are counted, and told once it flows again; the others are in order."""
    async with Logging(tmp_path, database).running() as service:
        service.chat()
        await service.post(20)
        lines = await service.lines("log lines dropped")  # it flows again
        reading = asyncio.create_task(service.lines())
        assert await service.stop() == 0
        lines += await reading
    numbers = [line["number"] for line in lines if line["event"] == "chat"]
    assert numbers == list(range(len(numbers)))
    assert 1000 <= len(numbers) < 5000
    told = [line for line in lines if line["event"] == "log lines dropped"]
    assert {line["level"] for line in told} == {"warning"}
    assert sum(line["count"] for line in told) >= 5000 - len(numbers)
    assert lines[-1]["event"] == "stopped"


async def test_a_stop_ends_though_nobody_reads_the_log(database: str, tmp_path: Path) -> None:
    async with Logging(tmp_path, database).running() as service:
        service.chat()
        await service.post()
        started = time.monotonic()
        assert await service.stop() == 0
        assert time.monotonic() - started < 10
    os.close(service.out)


async def test_nobody_is_there_any_more_to_read_the_log(database: str, tmp_path: Path) -> None:
    async with Logging(tmp_path, database).running() as service:
        os.close(service.out)
        service.chat()
        await service.post(20)
        assert await service.stop() == 0


INTERRUPTED = """
import logging, signal, sys, time
from datapipe import logs

logs.configure("info", "json", queued=True)
log = logging.getLogger("tests")
signal.signal(signal.SIGALRM, lambda *_: log.info("in between"))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0002)
end = time.monotonic() + 1
while time.monotonic() < end:
    log.info("line")
signal.setitimer(signal.ITIMER_REAL, 0)
"""


async def test_a_line_may_come_in_the_midst_of_another() -> None:
    """As where the collector runs, and what it ends has something to log."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTED, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    events = {json.loads(line)["event"] for line in said.splitlines()}
    assert {"line", "in between"} <= events


SAID = """
import sys
from datapipe import logs

logs.configure("info", sys.argv[1])
import structlog
log = structlog.stdlib.get_logger("tests")
log.info("segments loaded", lane="install", rows=3)
key = "s3" + "cret"
raise ValueError("on purpose")
"""


@pytest.mark.parametrize(
    ("form", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("json", True, True), ("console", False, False)],
)
async def test_lines_for_people_on_a_terminal(form: str, terminal: bool, is_json: bool) -> None:
    """Also the traceback, which shows no values."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SAID,
        form,
        cwd=ROOT,
        stdout=writer,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(writer)
    assert await process.wait() == 1
    told = b""
    with suppress(OSError):  # the end of a terminal
        while more := os.read(reader, 65_536):
            told += more
    os.close(reader)
    text = told.decode()
    first = text.splitlines()[0]
    assert ("\x1b" in text) == (terminal and not is_json)
    assert "ValueError: on purpose" in text
    assert "s3cret" not in text
    if is_json:
        assert json.loads(first)["rows"] == 3
        assert len(text.splitlines()) == 2
    else:
        assert "segments loaded" in first
        assert not first.startswith("{")
