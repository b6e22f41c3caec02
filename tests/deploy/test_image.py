"""The image: built by its Dockerfile, and run as the pages say, by a container engine."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.deploy.engine import IMAGE, SHUT, Engine
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import ROOT, until

pytestmark = pytest.mark.needs_root
UID = 10001
EVENT = {"event_name": "install", "user_id": 1, "timestamp": 1}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the image as the tracked files make it."""
    with Engine.running(tmp_path_factory.mktemp("image")) as engine:
        engine.build()
        yield engine


class Container:
    """One `datapipe serve` in a container, with a volume for `data_dir` that outlives it."""

    def __init__(self, engine: Engine, secrets: Path, **settings: Any) -> None:
        self.name = f"datapipe-{id(self)}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._engine = engine
        env = {"DATAPIPE_PORT": self.port, **settings}
        self._options = [
            *(f"--env={name}={value}" for name, value in env.items()),
            f"--volume={secrets}:/run/secrets:ro", f"--volume={self.name}:/var/lib/datapipe",
        ]  # fmt: skip

    async def start(self) -> None:
        words = ["run", "--detach", "--replace", "--name", self.name, *SHUT, *self._options, IMAGE]
        await asyncio.to_thread(self._engine, *words)

        async def listens() -> bool:
            return '"listening"' in await asyncio.to_thread(self._engine.logs, self.name)

        await until(listens, what=f"a container that listens: {self._engine.logs(self.name)}")

    async def stop(self, *, kill: bool = False) -> tuple[int, float]:
        """As the engine does it, with its STOPSIGNAL; the exit code, and the seconds it took."""
        began = time.monotonic()
        words = ["kill", self.name] if kill else ["stop", "--time=35", self.name]
        await asyncio.to_thread(self._engine, *words)
        if kill:
            await asyncio.to_thread(self._engine, "wait", self.name)
        state = (await asyncio.to_thread(self._engine.inspect, self.name))["State"]
        return int(state["ExitCode"]), time.monotonic() - began

    def exec(self, *words: str) -> str:
        return self._engine("exec", self.name, *words)


@pytest.fixture
def secrets(database: str, tmp_path: Path) -> Path:
    """Files as they are mounted: readable, with a line's end."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "database_url").write_text(f"{database}\n")
    (folder / "admin_key").write_text("s3cret\n")
    return folder


FILES = {
    "DATAPIPE_DATABASE_URL_FILE": "/run/secrets/database_url",
    "DATAPIPE_ADMIN_KEY_FILE": "/run/secrets/admin_key",
}


async def test_events_of_a_container_are_rows_whatever_ends_it(
    engine: Engine, database: str, secrets: Path
) -> None:
    """Its secrets are files, all but its volume is read-only, and what waits is not lost."""
    container = Container(engine, secrets, DATAPIPE_LOAD_INTERVAL=3600, **FILES)
    await container.start()

    def rows() -> int:
        ((found,),) = Postgres.execute(database, "SELECT count(*) FROM install")
        return int(found)

    key = {"Authorization": "Bearer s3cret"}
    async with aiohttp.ClientSession(container.url) as session:

        async def post(**headers: str) -> dict[str, Any]:
            async with session.post("/", json=EVENT, headers=headers) as response:
                assert response.status == 200
                found: dict[str, Any] = await response.json()
                return found

        assert (await post(Prefer="wait=20"))["loaded"] is True
        assert rows() == 1
        async with session.post("/load") as response:
            assert response.status == 401
        async with session.post("/load", headers=key) as response:
            assert response.status == 200
        engine("healthcheck", "run", container.name)
        inside = json.loads(container.exec("datapipe", "status", "--json"))
        assert inside["books"]["loaded"] == 1
        assert container.exec("cat", "/proc/1/status").count(f"Uid:\t{UID}\t{UID}") == 1
        assert container.exec("cat", "/proc/1/cmdline").startswith("/opt/datapipe/bin/python")
        await post()

    await container.stop(kill=True)
    assert rows() == 1
    await container.start()  # with the same volume, as after `docker compose up`
    async with aiohttp.ClientSession(container.url) as session:

        async def recovered() -> bool:
            return await asyncio.to_thread(rows) == 2

        await until(recovered, what="the event of the container that was killed")
        await post_to(session)
        assert rows() == 2
    code, seconds = await container.stop()
    assert (code, rows()) == (0, 3), engine.logs(container.name)
    assert seconds < 20
    log = engine.logs(container.name)
    assert "s3cret" not in log
    assert all(json.loads(line) for line in log.splitlines())


async def post_to(session: aiohttp.ClientSession) -> None:
    async with session.post("/", json=EVENT) as response:
        assert response.status == 200


# what of the image its own user may write to, and what has no place in what runs
LOOK = """
find / -xdev \\( -path /proc -o -path /dev -o -path /sys \\) -prune \\
    -o -writable ! -type l -print 2>&-
command -v gcc cc make pip pip3 || true
ls -d /opt/datapipe/lib/*/site-packages/* | grep -E '/(pip|setuptools)' || true
python -c 'import nats, nkeys, psycopg2, pymysql, sqlite3, uvloop'
python -c 'import datapipe; print(datapipe.__file__)'
find /opt/datapipe -name '*.py' | wc -l; find /opt/datapipe -name '*.pyc' | wc -l
"""


def test_what_is_in_it(engine: Engine) -> None:
    """Nothing that its user may write to but the volume, even where the root is not read-only."""
    code, printed = engine.once("-c", LOOK, entry="sh", options=["--read-only=false"])
    *found, package, sources, compiled = printed.splitlines()
    assert code == 0, printed
    assert package == "/opt/datapipe/lib/python3.11/site-packages/datapipe/__init__.py"
    # where Debian lets anybody write
    assert {*found} - {"/tmp", "/var/tmp", "/run/lock", "/var/lock"} == {"/var/lib/datapipe"}
    assert int(sources) == int(compiled) > 300


def test_the_file_is_in_order() -> None:
    """By hadolint; and the Python is the one that runs these tests."""
    tool = Path(sys.prefix) / "bin/hadolint"
    done = subprocess.run([tool, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    text = (ROOT / "Dockerfile").read_text()
    assert f"ARG PYTHON={(ROOT / '.python-version').read_text()}" in text
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:${PYTHON}-slim-bookworm"}


def test_what_it_says_of_itself(engine: Engine) -> None:
    said = engine.image()
    assert said["User"] == f"{UID}:{UID}"  # numbers: `runAsNonRoot` can't tell of a name
    assert set(said["Volumes"]) == {"/var/lib/datapipe"}
    assert set(said["ExposedPorts"]) == {"8080/tcp"}
    assert said["StopSignal"] == "SIGTERM"
    # no shell, which would hear the signals in our place
    assert (said["Entrypoint"], said["Cmd"]) == (["datapipe"], ["serve"])
    assert engine.health_command()[:2] == ["python", "-ISc"]
    assert said["Labels"]["org.opencontainers.image.licenses"] == "MIT"


def test_wrong_settings_end_it_with_one_line(engine: Engine) -> None:
    code, printed = engine.once(options=["--env=DATAPIPE_LOAD_INTERVALL=1"])
    assert code == 2
    assert printed.startswith("datapipe: load_intervall: no such setting"), printed
    assert printed.count("\n") == 1
    assert engine.once("--version")[1].startswith("datapipe ")


def test_nobody_who_listens_is_unhealthy(engine: Engine) -> None:
    program, *words = engine.health_command()
    code, printed = engine.once(*words, entry=program, options=[f"--env=PORT={free_port()}"])
    assert code == 1, printed
