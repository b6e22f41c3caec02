"""A real MariaDB server for tests, from Debian's `mariadb-server-core` and `mariadb-client-core`.

Both start nothing by themselves. It is started and ended by process id, and never runs as root.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pymysql

from tests.ports import free_port

# Data folders of a server that never ran, by its version: to make one takes seconds.
_TEMPLATES = Path(__file__).parent.parent / ".cache" / "mariadb"


def _run_as() -> dict[str, Any]:
    """Whom the server runs as: ourselves, unless we are root."""
    if os.geteuid() != 0:
        return {}
    for name in ("mysql", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise RuntimeError("no user to run MariaDB as")


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert found, f"{name} is not installed: tools/test-needs installs it"
    return found


class MariaDB:
    """One server with its data in a folder of its own; loopback only, `root` has no password.

    Args: options: of `mariadbd`, such as `local_infile="0"`.
    """

    def __init__(self, **options: str) -> None:
        self._run_as = _run_as()
        self._mariadbd = _program("mariadbd")
        # beneath /var/tmp, not /tmp: a checkout's temporary files may be closed to other users
        self.folder = Path(tempfile.mkdtemp(prefix="datapipe-test-my-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.data = self.folder / "data"
        self.port = free_port()
        self.options = {"innodb_buffer_pool_size": "64M", "max_connections": "100", **options}
        self._server: subprocess.Popen[bytes] | None = None
        _copy(self._template(), self.data)
        if self._run_as:
            owner = f"{self._run_as['user']}:{self._run_as['group']}"
            subprocess.run(["chown", "-R", owner, str(self.folder)], check=True)

    def _template(self) -> Path:
        """The data folder to begin with; made by whoever is the first to need it."""
        version = subprocess.run([self._mariadbd, "--version"], check=True, capture_output=True)
        template = _TEMPLATES / version.stdout.decode().split()[2]
        if template.exists():
            return template
        made = self.folder / "template"
        made.mkdir()
        if self._run_as:
            os.chown(made, self._run_as["user"], self._run_as["group"])
        subprocess.run(
            [_program("mariadb-install-db"), "--no-defaults", f"--datadir={made}",
             "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve",
             "--innodb-log-file-size=16M"],
            check=True, capture_output=True, cwd="/", **self._run_as,
        )  # fmt: skip
        _TEMPLATES.mkdir(parents=True, exist_ok=True)
        ours = _TEMPLATES / f"{template.name}.{uuid4().hex}"
        _copy(made, ours)
        shutil.rmtree(made)
        try:
            ours.rename(template)
        except OSError:  # somebody else was as fast
            shutil.rmtree(ours)
        return template

    @classmethod
    @contextmanager
    def running(cls, **options: str) -> Iterator[MariaDB]:
        """A server as long as the block lasts."""
        server = cls(**options)
        try:
            server.start()
            yield server
        finally:
            server.remove()

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self.options.items()]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._mariadbd, "--no-defaults", f"--datadir={self.data}", f"--port={self.port}",
                 "--bind-address=127.0.0.1", "--skip-name-resolve", f"--socket={self.folder}/s",
                 f"--tmpdir={self.folder}",  # whoever starts deletes temporary tables there
                 f"--pid-file={self.folder}/pid", "--innodb-log-file-size=96M", *options],
                stdout=log, stderr=log, cwd="/", start_new_session=True, **self._run_as,
            )  # fmt: skip
        for _ in range(600):
            try:
                self.execute(self.url("mysql"), "SELECT 1")
                return
            except pymysql.OperationalError:
                assert self._server.poll() is None, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.05)
        raise AssertionError("MariaDB does not answer")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM ends it in order, SIGKILL as a crash would; returns when it is gone."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(timeout=60)
            self._server = None

    def crash(self) -> None:
        """End it in the middle of whatever it does."""
        self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does."""
        assert self._server is not None
        self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self.stop(signal.SIGKILL)  # which ends what is frozen, too
        shutil.rmtree(self.folder, ignore_errors=True)

    def configure(self, **options: str | int) -> None:
        """Change settings of the running server; sessions that are open keep theirs."""
        for name, value in options.items():
            self.execute(self.url("mysql"), f"SET GLOBAL {name} = %s", value)

    def url(self, database: str) -> str:
        return f"mysql://root@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """A new, empty database; its URL."""
        name = f"t{uuid4().hex[:12]}"
        self.execute(self.url("mysql"), f"CREATE DATABASE {name}")
        return self.url(name)

    @staticmethod
    def connect(url: str, **more: Any) -> pymysql.connections.Connection[Any]:
        """A connection in autocommit."""
        parts = urlsplit(url)
        return pymysql.connect(
            host=parts.hostname or "", port=parts.port or 3306, user=unquote(parts.username or ""),
            password=unquote(parts.password or ""), database=parts.path.lstrip("/"),
            **{"charset": "utf8mb4", "connect_timeout": 10, "autocommit": True, **more},
        )  # fmt: skip

    @classmethod
    def execute(cls, url: str, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Run SQL in autocommit; the rows, if it gives any."""
        with cls.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute(sql, args or None)
            return list(cursor.fetchall()) if cursor.description else []

    async def aexecute(self, url: str, sql: str, *args: object) -> list[tuple[Any, ...]]:
        return await asyncio.to_thread(self.execute, url, sql, *args)


def _copy(source: Path, target: Path) -> None:
    """Holes stay holes: most of a new data folder is one."""
    subprocess.run(["cp", "-R", "--sparse=always", str(source), str(target)], check=True)
