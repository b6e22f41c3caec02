"""PgBouncer before a PostgreSQL server, as people run it; loopback only.

It is started and ended by process id, and never runs as root: it refuses to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2

from tests.ports import free_port
from tests.postgres import run_as


class PgBouncer:
    """One pooler; `url` is the way through it to the database.

    Args: settings: of `[pgbouncer]`, over those that are needed.
    """

    def __init__(self, database: str, **settings: object) -> None:
        to = urlsplit(database)
        self._run_as = run_as()
        self.folder = Path(tempfile.mkdtemp(prefix="datapipe-test-pooler-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.port = free_port()
        self.url = f"postgresql://{to.username}@127.0.0.1:{self.port}{to.path}"
        (self.folder / "users").write_text(f'"{to.username}" ""\n')
        given = {"listen_addr": "127.0.0.1", "listen_port": self.port, "unix_socket_dir": "",
                 "auth_type": "trust", "auth_file": self.folder / "users", **settings}  # fmt: skip
        lines = [f"{name} = {value}" for name, value in given.items()]
        databases = f"[databases]\n* = host={to.hostname} port={to.port}\n"
        (self.folder / "pgbouncer.ini").write_text(
            "\n".join([databases, "[pgbouncer]", *lines, ""])
        )
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextmanager
    def running(cls, database: str, **settings: object) -> Iterator[PgBouncer]:
        """A pooler as long as the block lasts."""
        pooler = cls(database, **settings)
        try:
            pooler.start()
            yield pooler
        finally:
            pooler.stop(signal.SIGKILL)
            shutil.rmtree(pooler.folder)

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "no pgbouncer: ./tools/test-needs installs it"
        self._process = subprocess.Popen(
            [program, "-q", str(self.folder / "pgbouncer.ini")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
            **self._run_as,
        )  # fmt: skip
        for _ in range(200):
            try:
                psycopg2.connect(self.url, connect_timeout=2).close()
                return
            except psycopg2.OperationalError as exc:
                if "refused" not in str(exc):
                    return  # it is there, and says no
                assert self._process.poll() is None, "PgBouncer did not start"
                time.sleep(0.02)
        raise AssertionError("PgBouncer does not answer")

    def stop(self, how: signal.Signals) -> None:
        """Returns when it is gone."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=20)
            self._process = None
