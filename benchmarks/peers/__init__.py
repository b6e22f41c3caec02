"""What people would run instead of datapipe: each takes the same events into the same table.

`tools/bench-needs` installs them into .cache/peers; README.md here says what each does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.servers import ROOT, WORK, Server, running
from tests.ports import free_port

_HERE = Path(__file__).parent
_INSTALLED = ROOT / ".cache" / "peers"
_PYTHON = _INSTALLED / "venv" / "bin" / "python"
_NODE_MODULES = _INSTALLED / "node_modules"
_DEBIAN = _INSTALLED / "debian"
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Peer:
    """A rival.

    `durable`: it answers once the rows, or a queue of them, are flushed to disk. `processes`: that
    take POSTs. `open` starts it on the URL of a database that has the (empty) table. `settle`
    returns once all that was answered is in the table; where that can't be known (not `durable`),
    it returns at once, and the caller waits until the count stands still.
    """

    name: str
    durable: bool
    processes: int
    open: Callable[[str], AbstractContextManager[Server]]
    settle: Callable[[Server], None]
    takes_batches: bool = True


def installed() -> list[str]:
    """What is missing, a line each."""
    needed = {
        "a Python environment": _PYTHON,
        "fastify": _NODE_MODULES / "fastify",
        "postgres": _NODE_MODULES / "postgres",
        "nginx": _DEBIAN / "usr/sbin/nginx",
        "rsyslog": _DEBIAN / "usr/sbin/rsyslogd",
    }
    missing = [f"{what}: no {path}" for what, path in needed.items() if not path.exists()]
    missing += [f"{name}: not in PATH" for name in ("node", "wrk") if shutil.which(name) is None]
    return missing


@contextmanager
def _fastify(how: str, processes: int, database_url: str) -> Iterator[Server]:
    command = ["node", str(_HERE / "fastify.js"), how, str(processes)]
    environ = {"NODE_PATH": str(_NODE_MODULES), "NODE_ENV": "production"}
    with running(command, environ | {"DATABASE_URL": database_url}) as server:
        yield server


@contextmanager
def _tornado(database_url: str) -> Iterator[Server]:
    with _folder("tornado-") as folder:
        command = [str(_PYTHON), str(_HERE / "tornado_queue.py"), str(folder)]
        with running(command, {"DATABASE_URL": database_url}) as server:
            yield server


@contextmanager
def _fastapi(database_url: str) -> Iterator[Server]:
    command = [str(_PYTHON), str(_HERE / "fastapi_insert.py")]
    with running(command, {"DATABASE_URL": database_url}) as server:
        yield server


@contextmanager
def _nginx(database_url: str) -> Iterator[Server]:
    with _folder("nginx-") as folder:
        shutil.copytree(_HERE / "nginx", folder, dirs_exist_ok=True)
        (folder / "debian").symlink_to(_DEBIAN)
        address = f"127.0.0.1:{free_port()}"
        (folder / "address").write_text(f"http://{address}\n")
        (folder / "listen.conf").write_text(f"listen {address} backlog=1024 reuseport;\n")
        # as root its workers would else be another user, who can't reach the folder
        (folder / "user.conf").write_text("user root;\n" if os.geteuid() == 0 else "")
        command = ["/bin/sh", str(folder / "run"), str(folder)]
        with running(command, {"DATABASE_URL": database_url}) as server:
            yield server


@contextmanager
def _folder(prefix: str) -> Iterator[Path]:
    WORK.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=WORK))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _loads(server: Server) -> None:
    server.load()


def _is_settled(server: Server) -> None:
    pass


PEERS: Sequence[Peer] = (
    Peer("Fastify + postgres, gathered", True, 1, partial(_fastify, "gathered", 1), _is_settled),
    Peer(
        f"Fastify + postgres, gathered, {_CORES} processes", True, _CORES,
        partial(_fastify, "gathered", _CORES), _is_settled,
    ),
    Peer("Fastify + postgres, an INSERT each", True, 1, partial(_fastify, "each", 1), _is_settled),
    Peer("Tornado + SQLite queue + COPY", True, 1, _tornado, _loads),
    Peer("FastAPI + asyncpg, an INSERT each", True, 1, _fastapi, _is_settled),
    Peer("nginx + Lua + rsyslog", False, _CORES, _nginx, _is_settled),
)  # fmt: skip
