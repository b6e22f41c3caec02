"""gunicorn with aiohttp's workers: the same promises, another master."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psycopg2
import pytest

from tests.deploy.processes import send, tree
from tests.deploy.shipped import status_of
from tests.fault.driver import Driver
from tests.ports import free_port
from tests.postgres import Postgres
from tests.service import ROOT, until

WORKERS = 2
INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 1}


class Gunicorn:
    """gunicorn with the file that is shipped; `lines` is its whole output, parsed."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None, **settings: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[dict[str, Any]] = []
        self._folder = folder
        self._cnf = folder / "datapipe.json"
        self._settings: dict[str, Any] = {"data_dir": str(folder / "var")}
        self.configure(**settings)
        self._env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT),
            "DATAPIPE_CNF": str(self._cnf), "PORT": str(self.port), "LANG": "C.UTF-8",
        } | (env or {})  # fmt: skip
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]

    def configure(self, **settings: Any) -> None:
        """Write down settings, over those that stand."""
        self._settings |= settings
        self._cnf.write_text(json.dumps(self._settings))

    @asynccontextmanager
    async def running(self, *options: str) -> AsyncIterator[Gunicorn]:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gunicorn", "-c", str(ROOT / "deploy/gunicorn.conf.py"),
            *options, "datapipe.app:gunicorn_app", cwd=self._folder, env=self._env,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())
        try:
            yield self
        finally:
            send(tree(self._process.pid), signal.SIGKILL)
            await self.ended()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            self.lines.append(json.loads(raw))  # nothing else may be among them

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    async def up(self) -> bool:
        assert self._process.returncode is None, self.lines
        with suppress(aiohttp.ClientError):
            return bool((await self.status())["processes"] == WORKERS)
        return False

    async def status(self) -> dict[str, Any]:
        return await status_of(self.url)

    async def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def reload(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    async def ended(self) -> int:
        async with asyncio.timeout(40):
            code = await self._process.wait()
        await self._reader
        return code


@pytest.mark.parametrize("worker", ["GunicornWebWorker", "GunicornUVLoopWebWorker"])
async def test_under_load_killed_reloaded_and_stopped(
    database: str, tmp_path: Path, seed: int, worker: str
) -> None:
    settings = {
        "database_url": database, "load_interval": 3600, "load_workers": 1,
        "event_modules": ["tests.fault.modules.quick_recovery"],
    }  # fmt: skip
    async with Gunicorn(tmp_path, **settings).running("-k", f"aiohttp.{worker}") as gunicorn:
        await until(gunicorn.up, what="two workers")
        driver = Driver(lambda: gunicorn.url, seed, connections=24)

        async def workers(count: int) -> None:
            async def there() -> bool:
                return len(gunicorn.logged("listening")) == count and await gunicorn.up()

            await until(there, what=f"{count} workers started so far")
            await driver.answered(50)

        async with driver.running():
            await driver.answered(100)
            os.kill(gunicorn.logged("listening")[0]["pid"], signal.SIGKILL)
            await workers(WORKERS + 1)
            gunicorn.configure(events={"signup": {"user_id": "int"}})
            await gunicorn.reload()  # new ones first, then the old ones load what they have, and go
            await workers(2 * WORKERS + 1)
            await until(lambda: there(gunicorn, "stopped", WORKERS), what="the old workers' end")
            assert await post(gunicorn, {"event_name": "signup", "user_id": 1}) == 200
            assert await gunicorn.stop() == 0
        assert not driver.torn, "an answer broke off"
    verdict = await driver.check(database)
    print(f"{worker}: {verdict.answered} events answered, {len(verdict.lost)} lost")
    assert gunicorn.logged("recovered")
    assert len(gunicorn.logged("stopping")) == len(gunicorn.logged("stopped")) == 2 * WORKERS
    assert {line["waiting"] for line in gunicorn.logged("stopped")} == {0}


async def post(gunicorn: Gunicorn, event: dict[str, Any], path: str = "/") -> int:
    """Post it on a connection of its own, to whichever worker takes it; the status."""
    url = f"{gunicorn.url}{path}"
    async with aiohttp.ClientSession() as session, session.post(url, json=event) as response:
        return response.status


async def test_with_the_embedded_database(tmp_path: Path) -> None:
    """Both workers use one server, which the last of them stops."""
    async with Gunicorn(tmp_path, load_interval=0.2, load_min_interval=0).running() as gunicorn:
        await until(gunicorn.up, what="two workers")
        for _ in range(20):
            assert await post(gunicorn, INSTALL) == 200

        async def loaded() -> bool:
            return bool((await gunicorn.status())["books"]["loaded"] == 20)

        await until(loaded, what="20 rows")
        assert await gunicorn.stop() == 0
    assert len(gunicorn.logged("embedded database stopped")) == 1


async def test_a_post_while_it_stops_is_answered(database: str, tmp_path: Path) -> None:
    """On a connection that is open the answer is 503, and not silence until the loads are done."""
    settings = {"database_url": database, "load_interval": 3600, "shutdown_timeout": 8}
    Postgres.execute(
        database, "CREATE TABLE install (user_id bigint, timestamp bigint, received_at timestamptz)"
    )
    async with Gunicorn(tmp_path, **settings).running("-w", "1") as gunicorn:
        url = f"{gunicorn.url}/"

        async def answers() -> bool:
            with suppress(aiohttp.ClientError):
                async with session.post(url, json=INSTALL) as response:
                    return response.status == 200
            return False

        async with aiohttp.ClientSession() as session:
            await until(answers, what="an answer")
            with locked_table(database):
                stopping = asyncio.create_task(gunicorn.stop())
                await until(lambda: there(gunicorn, "stopping"), what="its end")
                async with asyncio.timeout(5), session.post(url, json=INSTALL) as response:
                    assert response.status == 503
                    assert response.headers["Connection"] == "close"
            assert await stopping == 0


@contextmanager
def locked_table(database: str) -> Iterator[None]:
    """Nobody can load into `install`."""
    with psycopg2.connect(database) as connection:
        connection.cursor().execute("LOCK TABLE install")
        yield
        connection.rollback()
    connection.close()


async def there(gunicorn: Gunicorn, event: str, times: int = 1) -> bool:
    return len(gunicorn.logged(event)) >= times


@pytest.mark.parametrize(
    ("env", "settings", "words"),
    [
        ({"DATAPIPE_PROT": "1"}, {}, "no such setting"),
        ({}, {"database_url": "postgres://[", "mirror": "none"}, "can't be read"),
        ({}, {"data_dir": "/dev/null/x", "database_url": "postgres://h/d"}, "/dev/null"),
    ],
)
async def test_what_keeps_it_from_starting_is_one_line(
    tmp_path: Path, env: dict[str, str], settings: dict[str, Any], words: str
) -> None:
    # one worker: where two fail at a time, gunicorn itself may end with a traceback
    async with Gunicorn(tmp_path, env, **settings).running("-w", "1") as gunicorn:
        assert await gunicorn.ended() == 3
    told = gunicorn.logged("not started")
    assert told
    assert words in told[0]["error"]
    assert "Traceback" not in json.dumps(gunicorn.lines)


async def test_a_part_that_dies_ends_its_worker(database: str, tmp_path: Path) -> None:
    settings = {"database_url": database, "event_modules": ["tests.fault.modules.dying"]}
    async with Gunicorn(tmp_path, **settings).running("-w", "1") as gunicorn:

        async def another() -> bool:
            return len({line["pid"] for line in gunicorn.logged("listening")}) >= 2

        await until(another, what="another worker")
    assert "on purpose" in gunicorn.logged("stopping")[0]["error"]


async def test_nobody_acts_without_a_key(database: str, tmp_path: Path) -> None:
    """gunicorn may listen anywhere, whatever `host` says."""
    settings = {"database_url": database, "host": "127.0.0.1"}
    async with Gunicorn(tmp_path, **settings).running() as gunicorn:
        await until(gunicorn.up, what="two workers")
        assert await post(gunicorn, {}, "/load") == 403
