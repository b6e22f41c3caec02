"""SIGHUP: what changes while the service runs, what does not, and that nobody feels it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pty
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.service import ROOT, Service, until
from tests.wire import ask, crash, post, running

shared = pytest.mark.asyncio(loop_scope="module")

SHOP = "https://shop.example"
BASE: dict[str, Any] = {"load_interval": 3600, "load_min_interval": 0, "mirror": "none"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """One for all tests; each reloads what it needs."""
    folder = tmp_path_factory.mktemp("reload")
    more = BASE | {"database_url": f"sqlite:///{folder}/events.db"}
    async with running(folder, {"DATAPIPE_LOAD_MIN_INTERVAL": "7"}, **more) as service:
        yield service
        assert not service.logged("fault")


async def reload(service: Service, text: str | None = None, **settings: Any) -> dict[str, Any]:
    """Write the settings file, of these settings over those of the start, and reload; what it logs.

    Args: text: the file, instead.
    """
    service.file.write_text(text or json.dumps(service.settings | settings))
    outcomes = ("settings reloaded", "settings not reloaded")

    def found() -> list[dict[str, Any]]:
        return [line for line in service.lines if line.get("event") in outcomes]

    async def another() -> bool:
        return len(found()) > before

    before = len(found())
    os.kill(service.pid, signal.SIGHUP)
    await until(another, what="the reload")
    return found()[-1]


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


async def status_of(service: Service, key: str) -> int:
    return (await service.post(crash(), **bearer(key)))[0]


@shared
async def test_ingest_keys_from_the_next_request_on(service: Service) -> None:
    """Also on connections that are open, and for heads that are remembered."""
    await reload(service, ingest_keys=["old", {"name": "ios", "key": "a"}])
    for _ in range(3):
        assert await status_of(service, "old") == await status_of(service, "a") == 200
    line = await reload(service, ingest_keys=[{"name": "ios", "key": "b", "lanes": ["install"]}])
    assert (line["event"], line["changed"]) == ("settings reloaded", ["ingest_keys"])
    assert [await status_of(service, key) for key in ("old", "a", "b")] == [401, 401, 403]
    assert (await service.status())["keys"]["ios"]["accepted"] == 3
    assert (await reload(service))["changed"] == ["ingest_keys"]
    assert await status_of(service, "whatever") == 200


@shared
async def test_cors_origins(service: Service) -> None:
    preflight = f"OPTIONS / HTTP/1.1\r\nHost: x\r\nOrigin: {SHOP}\r\n\r\n".encode()

    async def answered() -> tuple[int, str | None]:
        asked = await ask(service, preflight, method="OPTIONS")
        posted = await ask(service, post(json.dumps(crash()).encode(), f"Origin: {SHOP}"))
        return asked.status, posted.headers.get("access-control-allow-origin")

    assert await answered() == (405, None)
    await reload(service, cors_origins=[SHOP])
    assert await answered() == (204, SHOP)
    await reload(service, cors_origins=["https://other.example"])
    assert await answered() == (403, None)
    await reload(service)
    assert await answered() == (405, None)


@shared
async def test_the_admin_key_also_of_those_who_look_on(service: Service) -> None:
    await reload(service, admin_key="one")
    url = f"{service.url}/stream"
    try:
        async with service.session.get(url, **bearer("one")) as stream:
            await stream.content.readline()
            await reload(service, admin_key="two")
            async with asyncio.timeout(10):
                await stream.content.read()  # it ends
        for key, status in (("one", 401), ("two", 200)):
            assert (await service.get("/dead", **bearer(key)))[0] == status
    finally:
        await reload(service)
    assert (await service.get("/dead"))[0] == 200


@shared
async def test_intervals_also_for_what_waits(service: Service) -> None:
    assert (await service.post(crash()))[0] == 200
    loaded = len(service.logged("segments loaded"))
    assert (await reload(service, load_interval=0.1))["changed"] == ["load_interval"]

    async def another() -> bool:
        return len(service.logged("segments loaded")) > loaded

    await until(another, 10, "a load")  # in 30 s another look would find it, too
    await reload(service)


@shared
async def test_the_log_level(service: Service) -> None:
    service.file.write_text(json.dumps(service.settings | {"log_level": "error"}))
    os.kill(service.pid, signal.SIGHUP)
    await service.post(crash())
    await service.load()
    quiet = len(service.lines)
    assert (await reload(service))["event"] == "settings reloaded"
    assert len(service.lines) == quiet + 1


@shared
@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("{", {}, "is not JSON"),
        (None, {"ingest_keys": "SECRET"}, "ingest_keys"),
        (None, {"prot": 1, "admin_key": "SECRET"}, "no such setting"),
        (None, {"ingest_keys": [{"name": "a", "key": "SECRET", "lanes": ["instal"]}]}, "'instal'"),
        (None, {"load_interval": 0, "admin_key": "SECRET"}, "load_interval"),
    ],
)
async def test_a_file_that_is_wrong_changes_nothing(
    service: Service, text: str | None, settings: dict[str, Any], words: str
) -> None:
    line = await reload(service, text, **settings)
    assert (line["event"], line["level"]) == ("settings not reloaded", "error")
    assert words in line["error"]
    assert "SECRET" not in "\n".join(service.raw)
    assert await status_of(service, "whatever") == 200
    assert (await service.get("/dead"))[0] == 200
    assert (await reload(service))["changed"] == []


@shared
async def test_what_only_a_restart_changes_is_named(service: Service) -> None:
    more = {"port": 1, "database_url": "mysql://u:SECRET@h/d", "admin_key": "SECRET"}
    assert (await reload(service, **more))["changed"] == ["admin_key"]
    assert (await reload(service))["changed"] == ["admin_key"]
    (line,) = service.logged("settings need a restart")
    assert (line["level"], line["settings"]) == ("warning", ["port", "database_url"])
    assert "SECRET" not in "\n".join(service.raw)


@shared
async def test_variables_stay_above_the_file(service: Service) -> None:
    assert (await reload(service, load_min_interval=3))["changed"] == []


async def test_keys_are_changed_under_load_and_no_request_fails(tmp_path: Path) -> None:
    """Two are valid at once while clients change over; nobody is refused, and nothing is lost.

    The keys are in a file of their own, as secrets are mounted.
    """
    keys = [f"k{i}" for i in range(6)]
    current, answered, used = keys[0], 0, [""] * 16
    end = asyncio.Event()

    secrets = tmp_path / "ingest_keys"

    def write(*valid: str) -> None:
        each = {"name": "ios", "lanes": ["crash_report"], "rate": 1e6}
        secrets.write_text(json.dumps([{**each, "key": key} for key in valid]))

    async def post_on(client: int) -> None:
        nonlocal answered
        while not end.is_set():
            body, key = [crash(), crash()] if client % 4 == 0 else crash(), current
            status, answer = await service.post(body, **bearer(key))
            assert status == 200, answer
            answered += len(body) if isinstance(body, list) else 1
            used[client] = key

    async def all_changed() -> bool:
        return set(used) == {current}

    write(current)
    env = {"DATAPIPE_INGEST_KEYS_FILE": str(secrets)}
    url = f"sqlite:///{tmp_path}/events.db"
    async with running(tmp_path, env, load_interval=0.2, database_url=url) as service:
        async with asyncio.TaskGroup() as clients:
            for client in range(len(used)):
                clients.create_task(post_on(client))
            for old, new in itertools.pairwise(keys):
                write(old, new)
                assert (await reload(service))["changed"] == ["ingest_keys"]
                current = new
                await until(all_changed, what="the clients' change")
                write(new)
                assert (await reload(service))["changed"] == ["ingest_keys"]
            end.set()
        assert (await service.drained())["loaded"] == answered
        assert (await service.status())["keys"]["ios"]["accepted"] == answered
        assert await service.stop() == 0


async def test_a_hangup_at_the_end_does_not_skip_the_loading(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    async with running(tmp_path, load_interval=3600, database_url=f"sqlite:///{file}") as service:
        await service.post(crash())
        await service.load()
        await service.post(crash())

        async def begun() -> bool:
            return bool(service.logged("stopping"))

        with closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            stopping = asyncio.create_task(service.stop())
            await until(begun, what="its end")
            os.kill(service.pid, signal.SIGHUP)
            await asyncio.sleep(0.1)  # it has got the signal before it can load
        assert await stopping == 0
        assert [line["waiting"] for line in service.logged("stopped")] == [0]
        assert len(service.logged("stopping")) == 1


def test_a_terminal_that_closes_ends_it(tmp_path: Path) -> None:
    """It sends the same signal; else a service would go on with nobody there to end it."""
    pid, terminal = pty.fork()
    if not pid:  # the service, whose controlling terminal it is
        env = {"DATAPIPE_DATA_DIR": "var", "DATAPIPE_DATABASE_URL": "sqlite:///events.db"}
        os.chdir(tmp_path)
        command = [sys.executable, "-m", "datapipe", "serve", "--host", "127.0.0.1", "--port", "0"]
        os.execve(sys.executable, command, {**env, "PYTHONPATH": str(ROOT)})
    said = b""
    while b"listening" not in said:
        said += os.read(terminal, 65536)
    os.kill(pid, signal.SIGHUP)  # while the terminal is there it reloads
    while b"settings reloaded" not in said:
        said += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
