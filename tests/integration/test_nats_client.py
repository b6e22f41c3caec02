"""The connection to the cluster comes back by itself, whatever became of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg2

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors.nats.mirror import open_nats
from tests.jetstream import NatsCluster
from tests.mirror_nats import opened, segment, settings_of, store, take_until
from tests.postgres import Postgres
from tests.service import Service, until

USERS = 'accounts {{ A {{ jetstream: enabled, users: [{{ user: "u", password: "{}" }}] }} }}'
INSTALL = {"event_name": "install", "user_id": 1, "timestamp": 2}


def rows(url: str) -> int:
    connection = psycopg2.connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM install")
            ((count,),) = cursor.fetchall()
            return int(count)
    finally:
        connection.close()


async def test_a_login_that_was_refused_works_once_it_is_allowed(tmp_path: Path) -> None:
    """nats-py gives up for good then."""
    with NatsCluster.running(tmp_path, 1, more=USERS.format("first")) as cluster:
        (node,) = cluster.nodes

        def allow(password: str) -> None:
            node.configure(USERS.format(password))
            os.kill(node.pid, signal.SIGHUP)

        login = {"nats_user": "u", "nats_password": "first"}
        async with opened(cluster, "t", mirror_timeout=1.0, **login) as mirror:
            await store(mirror, segment(1))
            mirror.requeue("install", await take_until(mirror, 1), put_off=False)
            allow("second")

            async def down() -> bool:
                appended = await mirror.append([segment(2)])
                return appended.error is not None and not mirror.state().up

            await until(down)
            error = mirror.state().error or ""
            assert "uthoriz" in error or "uthenticat" in error
            assert "first" not in error
            await asyncio.sleep(3)  # it has been refused several times
            allow("first")

            async def up() -> bool:
                return (await mirror.append([segment(3)])).error is None

            await until(up)
            assert mirror.state().up
            assert await mirror.take("install", 1000)  # by an inbox that is subscribed to anew


async def test_all_nodes_restart(own_nats: NatsCluster) -> None:
    async with opened(own_nats, "t", mirror_timeout=1.0) as mirror:
        await store(mirror, segment(1))
        await asyncio.to_thread(own_nats.kill)
        assert (await mirror.append([segment(2)])).error is not None
        assert not mirror.state().up
        await asyncio.to_thread(own_nats.start)

        async def up() -> bool:
            return (await mirror.append([segment(3)])).error is None

        await until(up)
        taken: list[Segment] = []
        async with asyncio.timeout(30):
            while len(taken) < 2:
                with suppress(MirrorUnavailable):  # the consumer has its leader later
                    taken += await mirror.take("install", 1_000_000)
        assert len(taken) == 2


async def test_it_opens_without_a_cluster_and_ends_so(tmp_path: Path) -> None:
    cluster = NatsCluster(tmp_path, 1)
    settings = settings_of(cluster, "t", mirror_timeout=0.5)
    async with asyncio.timeout(10), open_nats(settings, "one") as mirror:
        assert not mirror.state().up
        assert (await mirror.append([segment(1)])).error is not None


async def test_a_service_starts_without_its_cluster_and_connects_later(
    tmp_path: Path, make_service: Callable[..., Service], database: str
) -> None:
    cluster = NatsCluster(tmp_path / "nats", 3)
    service = make_service(database_url=database, mirror_timeout=1, **cluster.settings)
    await service.start()
    assert (await service.post(INSTALL))[0] == 503
    assert (await service.get("/healthz"))[0] == 200
    assert (await service.get("/readyz"))[0] == 503
    try:
        await asyncio.to_thread(cluster.start)

        async def accepted() -> bool:
            return (await service.post(INSTALL))[0] == 200

        await until(accepted)
        await service.drained()
        await until(lambda: asyncio.sleep(0, rows(database) == 1))
        assert await service.stop() == 0
    finally:
        cluster.kill()


async def test_a_service_with_another_database_ends_with_one_clear_line(
    make_service: Callable[..., Service], nats_node: NatsCluster, nats_prefix: str,
    postgres: Postgres,
) -> None:  # fmt: skip
    shared: dict[str, Any] = {**nats_node.settings, "nats_prefix": nats_prefix,
                              "nats_lane_max_bytes": 1 << 20}  # fmt: skip
    first = await make_service(database_url=postgres.create_database(), **shared).start()
    assert (await first.post(INSTALL))[0] == 200
    await first.drained()
    second = await make_service(database_url=postgres.create_database(), **shared).start(wait=False)
    assert await second.wait() == 1
    lines = [line for line in second.lines if "nats_prefix" in str(line.get("error"))]
    assert [line["event"] for line in lines] == ["stopping"], second.raw
    assert "database_url" in lines[0]["error"]
    assert not [raw for raw in second.raw if "Traceback" in raw]
    assert await first.stop() == 0
