"""Processes on several machines, that share a mirror's channel and no folder, appear as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.pipeline.coordinator import Coordinator
from datapipe.settings import Settings
from tests.doubles.channel import Cluster
from tests.doubles.memory_database import MemoryDatabase


class Machine:
    """One process, with a `data_dir` of its own."""

    def __init__(self, url: str, pipeline: Pipeline, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.pipeline = pipeline
        self.process = pipeline.status.process
        self._session = session

    async def post(self, users: int) -> None:
        rows = [{"event_name": "install", "user_id": n, "timestamp": 1} for n in range(users)]
        async with self._session.post(self.url, json=rows) as response:
            assert response.status == 200

    async def get(self, path: str) -> str:
        async with self._session.get(self.url + path) as response:
            assert response.status == 200
            return await response.text()

    async def status(self) -> dict[str, Any]:
        async with self._session.get(f"{self.url}status.json") as response:
            shown: dict[str, Any] = await response.json()
            return shown

    async def load(self) -> dict[str, Any]:
        async with self._session.post(f"{self.url}load") as response:
            answer: dict[str, Any] = await response.json()
            return answer


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
async def machines(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Machine]]:
    """Three of them; each knows by the database which others live."""
    database = MemoryDatabase()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = [
            await stack.enter_async_context(running(tmp_path / name, cluster, database, session))
            for name in ("web1", "web2", "web3")
        ]
        hosts = {each.process: f"web{n}:4711" for n, each in enumerate(made, 1)}
        living = lambda self: {id: hosts[id] for id in hosts if id != self._process}  # noqa: E731
        monkeypatch.setattr(Coordinator, "living", property(living))
        yield made


@asynccontextmanager
async def running(
    folder: Path, cluster: Cluster, database: MemoryDatabase, session: aiohttp.ClientSession
) -> AsyncIterator[Machine]:
    settings = Settings(host="127.0.0.1", data_dir=str(folder), mirror="journal", load_interval=300)
    app = create_app(settings, open_mirror=cluster.open, open_sink=database.open)
    runner = create_runner(app)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield Machine(f"http://{host}:{port}/", app[PIPELINE], session)
    finally:
        await runner.cleanup()


async def test_status_and_load_are_of_all_and_metrics_of_one_machine(
    cluster: Cluster, machines: list[Machine]
) -> None:
    for events, machine in enumerate(machines, 1):
        await machine.post(events)
    for events, machine in enumerate(machines, 1):
        status = await machine.status()
        assert (status["processes"], status["silent"]) == (3, [])
        assert (status["process"], status["books"]["accepted"]) == (machine.process, 6)
        assert status["summary"]["state"] == "healthy"
        assert "3 processes" in await machine.get("")
        metrics = await machine.get("metrics")
        assert f'datapipe_events_accepted_total{{lane="install"}} {events}.0\n' in metrics
    assert await machines[1].load() == {"loaded": {"install": 6}, "failed": {}}
    status = await machines[2].status()
    assert (status["books"]["loaded"], status["books"]["balanced"]) == (6, True)


async def test_who_is_silent_is_named(cluster: Cluster, machines: list[Machine]) -> None:
    one, two, three = machines
    for machine in machines:
        await machine.post(2)
    cluster.frozen = {two.process}
    status = await one.status()
    assert (status["processes"], status["silent"]) == (2, ["web2:4711"])
    assert status["books"]["accepted"] == 4
    assert status["summary"]["state"] == "process_silent"
    assert status["summary"]["text"].startswith("No answer from web2:4711 (since ")
    page = await one.get("")
    assert "No answer from web2:4711 (since" in page
    assert "2 processes, 1 silent" in page
    answer = {"loaded": {"install": 4}, "failed": {}, "silent": ["web2:4711"]}
    assert await three.load() == answer
    cluster.frozen.clear()
    assert (await one.load()).keys() == {"loaded", "failed"}
    for machine in (three, one):  # the first to be asked does not hear from `one` how it was
        status = await machine.status()
        assert (status["processes"], status["silent"]) == (3, [])
        assert status["summary"]["state"] == "healthy"


async def test_alone_while_the_cluster_is_away(cluster: Cluster, machines: list[Machine]) -> None:
    one = machines[0]
    for machine in machines:
        await machine.post(2)
    cluster.up = False
    status = await one.status()
    assert (status["processes"], status["silent"]) == (1, ["web2:4711", "web3:4711"])
    assert status["books"]["accepted"] == 2
    assert (await one.load())["silent"] == ["web2:4711", "web3:4711"]


async def test_the_stream_follows_all(cluster: Cluster, machines: list[Machine]) -> None:
    one, two, _ = machines
    news = one.pipeline.feed.listen()
    await anext(news)
    await two.post(5)
    async with asyncio.timeout(10):
        async for each in news:
            if each.status["books"]["accepted"] == 5:
                break
    await news.aclose()
