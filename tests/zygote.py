"""Runs datapipe quickly: each process is forked from one that has imported it already.

A start takes a tenth of the CPU time that a new interpreter takes, and the suite starts hundreds.
What is run is the command's own `main`, in a session, a folder and an environment of its own, with
no descriptor but its output.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_REQUEST_BYTES = 1 << 17
# variables that only a new interpreter reads
_AT_EXEC = ("PYTHON", "LD_", "MALLOC_", "LANG", "LC_")


def can_fork(env: dict[str, str]) -> bool:
    """Whether a process with these variables, over the usual ones, may be forked."""
    return not any(name.startswith(_AT_EXEC) for name in env)


class Forked:
    """A forked process; what tests use of `asyncio.subprocess.Process`. Made by a running loop.

    Attributes: stderr: at its end if it has none of its own, and writes to `stdout`.
    """

    def __init__(
        self, pid: int, status: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self._status = status
        self._returncode: int | None = None
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(status, self._end)

    def _end(self) -> None:
        self._loop.remove_reader(self._status)
        self._returncode = int(os.read(self._status, 16))
        os.close(self._status)
        self._ended.set()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None: it runs."""
        if self._returncode is None and select.select([self._status], [], [], 0)[0]:
            self._end()
        return self._returncode

    async def wait(self) -> int:
        """Wait for its end; see `returncode`."""
        await self._ended.wait()
        assert self._returncode is not None
        return self._returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended, and we have not been told yet
                os.kill(self.pid, number)


class Zygote:
    """The process that forks; it ends with the one that made it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    async def start(
        self,
        words: Sequence[str],
        env: dict[str, str],
        cwd: Path,
        limit: int,
        *,
        apart: bool = False,
    ) -> Forked:
        """Run `datapipe` with these words; its output is bounded by `limit` bytes a line.

        Args: apart: stderr has a stream of its own.
        """
        status, told = os.pipe()
        streams = [os.pipe() for _ in range(1 + apart)]
        theirs = [told, *(write for _, write in streams)]
        request = json.dumps({"words": words, "env": env, "cwd": str(cwd)}).encode()
        try:
            socket.send_fds(self._socket, [request], theirs)
        finally:
            for each in theirs:
                os.close(each)
        pid = int(self._socket.recv(16))
        readers = [await _reader(read, limit) for read, _ in streams]
        if not apart:
            readers.append(nothing := asyncio.StreamReader())
            nothing.feed_eof()
        return Forked(pid, status, *readers)

    def end(self) -> None:
        self._socket.close()
        self._process.wait(timeout=10)


async def _reader(descriptor: int, limit: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    return reader


def _serve(orders: socket.socket) -> None:
    """Fork as ordered, and tell how each child ended, until nobody orders any more."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    told: dict[int, int] = {}  # by child: where its end is told
    while True:
        ready, _, _ = select.select([orders.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(told)
        if orders.fileno() in ready:
            request, fds, _, _ = socket.recv_fds(orders, _REQUEST_BYTES, 3)
            if not request:
                return
            status, *outputs = fds
            pid = os.fork()
            if pid == 0:
                _become(json.loads(request), outputs)
            told[pid] = status
            for output in outputs:
                os.close(output)
            orders.send(str(pid).encode())


def _reap(told: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            os.write(told[pid], str(os.waitstatus_to_exitcode(status)).encode())
            os.close(told.pop(pid))


def _become(request: dict[str, Any], outputs: list[int]) -> None:
    """Be a process that was started as `python -m datapipe` with these words; never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.chdir(request["cwd"])
        os.dup2(outputs[0], 1)
        os.dup2(outputs[-1], 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["datapipe", *request["words"]]
        sys.path[:1] = [request["cwd"], str(ROOT)]
        from datapipe.cli.main import main

        code = main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        logging.shutdown()  # as the interpreter does at its end: lines may wait to be written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_all() -> None:
    import datapipe

    for module in pkgutil.walk_packages(datapipe.__path__, "datapipe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("uvloop")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _import_all()
    _serve(socket.socket(fileno=int(sys.argv[1])))
