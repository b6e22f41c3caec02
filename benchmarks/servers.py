"""The servers under load: each a process of its own on loopback, ended by its process id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK = ROOT / "var" / "bench"  # a real disk: /tmp may be memory
_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A running server; `url` is its address."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.pid = process.pid
        self.url = url

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_mb(self, what: str = "VmRSS") -> float:
        """Resident memory in MB (10^6 bytes); its highest mark with `VmHWM`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise KeyError(what)

    def load(self) -> dict[str, Any]:
        """`POST /load`: load now what waits. Raises: OSError; RuntimeError: a load failed."""
        request = urllib.request.Request(f"{self.url}/load", method="POST")
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        if answer.get("failed"):
            raise RuntimeError(f"POST /load: {answer['failed']}")
        return answer


@contextmanager
def bare() -> Iterator[Server]:
    """The bare aiohttp application."""
    with _running([sys.executable, "-m", "benchmarks.bare"], {}) as server:
        yield server


@contextmanager
def datapipe(database_url: str, **settings: Any) -> Iterator[Server]:
    """`datapipe serve` at its default settings, with a journal of its own."""
    WORK.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="datapipe-", dir=WORK))
    try:
        file = folder / "datapipe.json"
        values = {"host": "127.0.0.1", "port": 0, "data_dir": str(folder), **settings}
        file.write_text(json.dumps({**values, "database_url": database_url}))
        command = [sys.executable, "-m", "datapipe", "serve"]
        with _running(command, {"DATAPIPE_CNF": str(file)}) as server:
            yield server
    finally:
        shutil.rmtree(folder)


@contextmanager
def _running(command: list[str], environ: dict[str, str]) -> Iterator[Server]:
    ours = ("DATAPIPE_", "IRON_", "PORT", "DATABASE_URL", "DYNO")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)} | environ
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield Server(process, _address(process, log.fileno()))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], log: int) -> str:
    """Where it listens, from its log. Raises: RuntimeError: it does not."""
    for _ in range(300):
        text = os.pread(log, 1 << 20, 0).decode(errors="replace")
        for line in text.splitlines():
            if line.startswith("{") and '"listening"' in line:
                return str(json.loads(line)["address"])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} does not listen:\n{text}")
