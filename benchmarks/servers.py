"""The servers under load: each with its processes on loopback, ended by process id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
WORK = ROOT / "var" / "bench"  # a real disk: /tmp may be memory
AS_RUN = ROOT / ".cache" / "run" / "bin" / "python"  # with what `make run` installs, no more
_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A running server; `url` is its address. Its figures take in the processes it has started."""

    def __init__(self, pid: int, url: str, log: int = -1) -> None:
        self.pid = pid
        self.url = url
        self._log = log  # a file's number; -1: it has none

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far, those of children that have ended as well."""
        ticks = 0
        for pid in self._pids():
            fields = _read(pid, "stat").rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
        return ticks / _TICKS

    def memory_mb(self, what: str = "VmRSS") -> float:
        """Resident memory in MB (10^6 bytes); its highest mark with `VmHWM`.

        Pages that several processes share count in each.
        """
        lines = [line for pid in self._pids() for line in _read(pid, "status").splitlines()]
        kib = [int(line.split()[1]) for line in lines if line.startswith(f"{what}:")]
        if not kib:
            raise KeyError(what)
        return sum(kib) * 1024 / 1e6

    def _pids(self) -> list[int]:
        """The server and all that descend from it."""
        pids = [self.pid]
        for pid in pids:  # grows as it is read
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                for task in os.listdir(f"/proc/{pid}/task"):
                    pids += map(int, _read(pid, f"task/{task}/children").split())
        return pids

    def load(self) -> dict[str, Any]:
        """`POST /load`: load now what waits. Raises: OSError; RuntimeError: a load failed."""
        request = urllib.request.Request(f"{self.url}/load", method="POST")
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        if answer.get("failed"):
            raise RuntimeError(f"POST /load: {answer['failed']}")
        return answer

    def status(self) -> dict[str, Any]:
        """`/status.json` of a datapipe."""
        with urllib.request.urlopen(f"{self.url}/status.json", timeout=120) as response:
            status: dict[str, Any] = json.load(response)
        return status

    def books(self) -> dict[str, int]:
        """The books of a datapipe, over all lanes."""
        books: dict[str, int] = self.status()["books"]
        return books

    def buckets(self, name: str) -> dict[float, float]:
        """A histogram of a datapipe's `/metrics`: how many took at most so many seconds."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=120) as response:
            families = text_string_to_metric_families(response.read().decode())
        samples = next(family.samples for family in families if family.name == name)
        return {float(s.labels["le"]): s.value for s in samples if s.name == f"{name}_bucket"}

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log lines of this event so far."""
        size = os.fstat(self._log).st_size
        lines = os.pread(self._log, size, 0).decode(errors="replace").splitlines()
        found = [json.loads(line) for line in lines if f'"{event}"' in line]
        return [line for line in found if line["event"] == event]

    def is_ready(self) -> bool:
        """Whether a datapipe would take an event now."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=120):
                return True
        except urllib.error.HTTPError:
            return False


class Servers(Server):
    """Several on one port, whose figures are summed."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.url = servers[0].url
        self._servers = servers

    def _pids(self) -> list[int]:
        return [pid for server in self._servers for pid in server._pids()]


def busy_s() -> float:
    """CPU seconds of the whole machine so far, those of the kernel as well."""
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8]
    )
    return (user + nice + system + irq + softirq) / _TICKS


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty once the process or thread has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def bare() -> AbstractContextManager[Server]:
    """The bare aiohttp application."""
    return running([sys.executable, "-m", "benchmarks.bare"], {})


def sink() -> AbstractContextManager[Server]:
    """What the generator can send at most."""
    return running([sys.executable, "-m", "benchmarks.sink"], {})


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder on a real disk that goes when it is left."""
    WORK.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="datapipe-", dir=WORK))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def postgres(of: Postgres) -> Server:
    """PostgreSQL with its backends, to look at its CPU."""
    pid = (of.data / "postmaster.pid").read_text().split()[0]
    return Server(int(pid), of.url("postgres"))


@contextmanager
def datapipe(database_url: str, processes: int = 1, **settings: Any) -> Iterator[Server]:
    """`datapipe serve` at its default settings, with a `data_dir` of its own."""
    with work_folder() as folder, ExitStack() as stack:
        if processes == 1:
            yield stack.enter_context(datapipe_in(folder, database_url, **settings))
            return
        servers: list[Server] = []
        for _ in range(processes):
            port = urlsplit(servers[0].url).port if servers else 0
            own = {"reuse_port": True, "port": port, **settings}
            servers.append(stack.enter_context(datapipe_in(folder, database_url, **own)))
        yield Servers(servers)


@contextmanager
def datapipe_in(
    folder: Path, database_url: str, *, python: str = sys.executable, **settings: Any
) -> Iterator[Server]:
    """The same with a `data_dir` that stays: what waits there is taken over."""
    file = folder / "datapipe.json"
    values = {"host": "127.0.0.1", "port": 0, "data_dir": str(folder), **settings}
    file.write_text(json.dumps({**values, "database_url": database_url}))
    command = [python, "-m", "datapipe", "serve"]
    with running(command, {"DATAPIPE_CNF": str(file)}) as server:
        yield server


@contextmanager
def running(command: Sequence[str], environ: dict[str, str]) -> Iterator[Server]:
    """Start a server that prints `{"event": "listening", "address": URL}`; SIGTERM ends it.

    Raises: RuntimeError: it does not listen within half a minute.
    """
    # the last would have each start compile what it imports anew, which takes memory as well
    ours = ("DATAPIPE_", "IRON_", "PORT", "DATABASE_URL", "DYNO", "PYTHONDONTWRITEBYTECODE")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)} | environ
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield Server(process.pid, _address(process, log.fileno()), log.fileno())
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with suppress(ProcessLookupError):  # children that it left behind
                os.killpg(process.pid, signal.SIGKILL)


def _address(process: subprocess.Popen[bytes], log: int) -> str:
    """Where it listens, from its log. Raises: RuntimeError: it does not."""
    for _ in range(1500):
        text = os.pread(log, 1 << 20, 0).decode(errors="replace")
        for line in text.splitlines():
            if line.startswith("{") and '"listening"' in line:
                return str(json.loads(line)["address"])
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen:\n{text}")
