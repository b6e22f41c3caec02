"""`make run-cluster`, as somebody tries it: a folder with a space, lines as printed, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.service import ROOT, until


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that PostgreSQL's user can enter, which pytest's own are not for root."""
    folder = Path(tempfile.mkdtemp(prefix="datapipe test ", dir="/var/tmp")).resolve()
    folder.chmod(0o755)
    (folder / "tools").symlink_to(ROOT / "tools")
    yield folder
    for pid in living(folder):  # of a test that failed
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)


class Run:
    """One `make run-cluster`. Attributes: lines: what it printed, as word and line."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.text = ""

    @classmethod
    @asynccontextmanager
    async def started(cls, folder: Path, port: int) -> AsyncIterator[Run]:
        mine = ("DATAPIPE_", "IRON_", "NATS_", "DATABASE_", "MAKE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(mine)} | {"PORT": str(port)}
        process = await asyncio.create_subprocess_exec(
            "make", "-f", str(ROOT / "Makefile"), "-o", ".venv/.cluster",
            f"BIN={Path(sys.executable).parent}", "run-cluster",
            cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        run = cls(process, folder)
        reader = asyncio.create_task(run._read())
        try:
            yield run
        finally:
            if process.returncode is None:
                await run.ctrl_c()
            await reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.text += line.decode()

    async def printed(self, text: str) -> None:
        async def there() -> bool:
            assert self._process.returncode is None or text in self.text, self.text
            return text in self.text

        await until(there, 90, repr(text))

    def lines(self, word: str) -> list[str]:
        return re.findall(rf"^  {word}   (.+)$", self.text, re.MULTILINE)

    async def rows(self, wanted: int) -> None:
        """Wait until the line as printed shows so many."""

        async def there() -> bool:
            (line,) = self.lines("rows")
            return f"({wanted} row" in await shell(line, self._folder)

        await until(there, what=f"{wanted} rows")

    async def ctrl_c(self) -> int:
        """As the terminal sends it: to make and what it runs, not to what has its own session."""
        os.killpg(self._process.pid, signal.SIGINT)
        return await self.ended()

    async def ended(self) -> int:
        return await asyncio.wait_for(self._process.wait(), 60)


async def shell(line: str, folder: Path) -> str:
    process = await asyncio.create_subprocess_shell(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, f"{line}: {said}"
    return said


def living(folder: Path) -> list[int]:
    """All processes of a cluster that was started there, the database's among them."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid, at = int(entry.name), (entry / "cwd").readlink()
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if at == folder or str(folder) in words:
                found.append(pid)
    return found


def report(folder: Path, pids: set[int]) -> str:
    """What those of these that live wait for, and the last words of all logs."""
    words = []
    for pid in pids:
        with suppress(OSError):
            words += [Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "wchan")]
    logs = (folder / "var/cluster").glob("*.log")
    words += [f"{log.name}: {log.read_text()[-3000:]}" for log in logs]
    return "\n".join(words)


async def post(line: str, folder: Path) -> None:
    """Run the line until it is taken: a leader that was killed is missed for seconds."""

    async def taken() -> bool:
        return '"status_code": 0' in await shell(line.replace("curl", "curl -s"), folder)

    await until(taken, 30, "an event that is taken")


async def test_it_is_tried_out(place: Path) -> None:
    port = next(p for p in free_ports("127.0.0.1", 100) if p % 2 == 0)
    async with Run.started(place, port) as run:
        await run.printed("logs")
        assert run.lines("page") == [f"http://127.0.0.1:{p}/" for p in (port, port + 1)]
        for page in run.lines("page"):
            assert "<html" in await shell(f"curl -s {page}", place)
        for line in run.lines("post"):
            await post(line, place)
        await run.rows(2)

        kills = run.lines("kill")
        names = ["nats-1", "nats-2", "nats-3", f"datapipe-{port}", f"datapipe-{port + 1}"]
        assert [line.partition("# ")[2] for line in kills] == names
        await shell(kills[1], place)
        await shell(kills[3], place)
        await run.printed("nats-2 ended (SIGKILL)")
        await post(run.lines("post")[1], place)
        await run.rows(3)
        await run.printed("nats-2 runs again")
        await run.printed(f"datapipe-{port} runs again")
        await post(run.lines("post")[1], place)  # loaded on the way out, if not before
        await run.ctrl_c()
        assert "does not end" not in run.text
    assert living(place) == []
    logs = [place / f"var/cluster/datapipe-{number}.log" for number in (port, port + 1)]
    lines = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert [each[-1]["event"] for each in lines] == ["stopped", "stopped"]
    # which of the two loaded it, the other one need not know yet
    loads = [line for each in lines for line in each if line["event"] == "segments loaded"]
    assert sum(line["rows"] for line in loads) == 4

    async with Run.started(place, port) as run:
        await run.printed("logs")
        await run.rows(4)
        for line in run.lines("post"):
            await post(line, place)
        await run.rows(6)
    assert living(place) == []


async def test_what_a_killed_one_left_is_not_run_twice(place: Path) -> None:
    port = next(p for p in free_ports("127.0.0.1", 100) if p % 2 == 0)
    async with Run.started(place, port) as run:
        await run.printed("logs")
        (program,) = [pid for pid in living(place) if is_program(pid)]
        os.kill(program, signal.SIGKILL)
        await run.ended()
    async with Run.started(place, port) as run:
        assert await run.ended() != 0
    found = re.search(r"var/cluster is in use; .*: kill ((\d+ ?){5})$", run.text, re.MULTILINE)
    assert found, run.text
    left = set(map(int, found[1].split()))
    for pid in left:
        os.kill(pid, signal.SIGTERM)

    async def gone() -> bool:
        return left.isdisjoint(living(place))

    try:
        await until(gone, 60, "the end of what was left")
    except AssertionError:
        pytest.fail(f"still there: {report(place, left)}")
    async with Run.started(place, port) as run:
        await run.printed("logs")
        for line in run.lines("post"):
            await post(line, place)
        await run.rows(2)
    assert living(place) == []  # the database, too: it was joined, and is stopped by its last user


def is_program(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[1] == b"tools/run-cluster"
