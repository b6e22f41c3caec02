"""More clients than open files are allowed: they wait, and nothing else suffers."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from tests.deploy.test_gunicorn import INSTALL, WORKERS, Gunicorn
from tests.deploy.test_gunicorn import post as post_one
from tests.postgres import Postgres
from tests.service import Service, until
from tests.wire import Wire, ask, crash, post, wire

MakeService = Callable[..., Service]
LIMITS = [(64, 500), (256, 2000), (1024, 1100)]  # open files, clients
STATUS = b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    """This process needs many itself."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def clients(address: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections, or tries to connect: some wait for the kernel already."""
    url = urllib.parse.urlsplit(address)
    with ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in made:
            each.setblocking(False)
            each.connect_ex((url.hostname, url.port))
        yield made


async def limited(make_service: MakeService, database: str, limit: int) -> Service:
    limited_to = ("prlimit", f"--nofile={limit}:{limit}")
    service = make_service(
        inside=limited_to, database_url=database, load_interval=0.2, request_timeout=300
    )
    return await service.start()


@pytest.mark.parametrize(("limit", "count"), LIMITS)
async def test_idle_clients_beyond_the_limit_wait_and_nothing_else_suffers(
    database: str, make_service: MakeService, limit: int, count: int
) -> None:
    service = await limited(make_service, database, limit)

    async def told(line: Wire) -> dict[str, float]:
        await line.send(STATUS)
        return dict((await line.answer(method="GET")).json)

    async def full() -> bool:
        return bool(service.logged("connections wait"))

    async with wire(service) as line:
        with clients(service.url, count):
            await until(full, what="a log line that connections wait")
            late = asyncio.create_task(ask(service, post(json.dumps(crash(user_id=-1)).encode())))
            started = (await told(line))["uptime_seconds"]
            sent = 0
            while (await told(line))["uptime_seconds"] < started + 3:  # some looks, some loads
                await line.send(post(json.dumps(crash(user_id=sent)).encode()))
                assert (await line.answer()).status == 200
                sent += 1
                await asyncio.sleep(0.02)
            assert not late.done()
        assert (await late).status == 200
    await service.drained()
    assert Postgres.execute(database, "SELECT count(*) FROM crash_report") == [(sent + 1,)]
    assert await service.stop() == 0
    assert len(service.logged("connections wait")) == 1
    levels = {line["level"] for line in service.lines if line["event"] != "connections wait"}
    assert levels == {"info"}


@pytest.mark.parametrize(("limit", "count"), [LIMITS[0], LIMITS[-1]])
async def test_working_clients_beyond_the_limit_are_answered_as_others_go(
    database: str, make_service: MakeService, limit: int, count: int
) -> None:
    service = await limited(make_service, database, limit)
    url = urllib.parse.urlsplit(service.url)
    stay, answered = asyncio.Event(), 0

    async def client(id: int) -> int:
        nonlocal answered
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            line = Wire(reader, writer)
            await line.send(post(json.dumps(crash(user_id=id)).encode()))
            status = (await line.answer(60)).status
            answered += 1
            await stay.wait()
            return status
        finally:
            writer.transport.abort()

    async def full() -> bool:
        return bool(service.logged("connections wait"))

    work = [asyncio.create_task(client(id)) for id in range(count)]
    await until(full, what="a log line that connections wait")
    assert answered < limit
    stay.set()
    assert set(await asyncio.gather(*work)) == {200}
    await service.drained()
    assert Postgres.execute(database, "SELECT count(*) FROM crash_report") == [(count,)]
    assert await service.stop() == 0
    assert not service.logged("mirror down") + service.logged("database down")


@pytest.mark.parametrize("worker", ["GunicornWebWorker", "GunicornUVLoopWebWorker"])
async def test_a_worker_of_gunicorn_outlives_the_want_of_files(
    database: str, tmp_path: Path, worker: str
) -> None:
    """There gunicorn takes the connections: no file is left for anything, and all heals."""
    gunicorn = Gunicorn(tmp_path, database_url=database, load_interval=0.2)
    async with gunicorn.running("-k", f"aiohttp.{worker}"):
        await until(gunicorn.up, what="two workers")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{gunicorn.url}/stream") as page,
        ):
            for line in gunicorn.logged("listening"):
                resource.prlimit(line["pid"], resource.RLIMIT_NOFILE, (64, 64))
            with clients(gunicorn.url, 500):
                for _ in range(4):  # the page's news, once a second
                    assert await asyncio.wait_for(page.content.readuntil(b"\r\n\r\n"), 15)

        async def answered() -> bool:
            with suppress(aiohttp.ClientError):
                return await post_one(gunicorn, INSTALL) == 200
            return False

        await until(answered, what="an answer of 200")
        await until(gunicorn.up, what="both workers, which see each other")

        async def loaded() -> bool:
            books = (await gunicorn.status())["books"]
            return bool(books["loaded"] and not books["waiting"])

        await until(loaded, what="a load")
        assert await gunicorn.stop() == 0
    assert not gunicorn.logged("background task died")
    assert len(gunicorn.logged("listening")) == WORKERS
