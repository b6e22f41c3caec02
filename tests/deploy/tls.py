"""A PostgreSQL as platforms give it: TLS, a self-signed certificate, a role of limited rights."""

from __future__ import annotations

import os
import shutil
from uuid import uuid4

import trustme

from tests.postgres import Postgres

CONNECTIONS = 20


class TlsPostgres(Postgres):
    """Roles that `create_app_database` makes come in by TLS and password, and in no other way."""

    def __init__(self, **options: str) -> None:
        super().__init__(ssl="on", **options)
        itself = trustme.CA()  # signed by itself, known to nobody
        self._write("server.crt", itself.cert_pem.bytes())
        self._write("server.key", itself.private_key_pem.bytes())
        self._write(
            "pg_hba.conf",
            b"host all postgres 127.0.0.1/32 trust\n"  # the test itself
            b"hostssl all all 127.0.0.1/32 scram-sha-256\n",
        )

    def _write(self, name: str, content: bytes) -> None:
        path = self.data / name
        path.write_bytes(content)
        path.chmod(0o600)
        if self._run_as:
            shutil.chown(path, self._run_as["user"], self._run_as["group"])

    def create_app_database(self) -> tuple[str, str]:
        """A new database and its owner: the URL as the platform gives it, and ours."""
        name, password = f"app{uuid4().hex[:8]}", os.urandom(16).hex()
        ours = self.url("postgres")
        self.execute(
            ours, f"CREATE ROLE {name} LOGIN PASSWORD '{password}' CONNECTION LIMIT {CONNECTIONS}"
        )
        self.execute(ours, f"CREATE DATABASE {name} OWNER {name}")
        given = f"postgres://{name}:{password}@127.0.0.1:{self.port}/{name}"
        return given, self.url(name)
