"""Heroku, one dyno: what its platform does to a process costs no event."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

import psycopg2
import pytest

from tests.deploy.heroku import MEMORY_BYTES, STOP_S, App, Build
from tests.deploy.processes import send, tree
from tests.deploy.router import Router
from tests.deploy.tls import CONNECTIONS, TlsPostgres
from tests.fault.driver import Driver
from tests.fault.ironmq_process import Queue, running_queue
from tests.ports import free_port

OURS = 6  # connections at the most: 3 that load, 2 for the rest, 1 that looks for the address


def config(given: str, queue: Queue) -> dict[str, str]:
    """What the add-ons set."""
    return {
        "DATABASE_URL": given, "IRON_MQ_HOST": queue.url,
        "IRON_MQ_PROJECT_ID": queue.settings["ironmq_project_id"],
        "IRON_MQ_TOKEN": queue.settings["ironmq_token"],
    }  # fmt: skip


class Connections:
    """How many connections the app has, at the most, and whether any was without TLS."""

    def __init__(self, database: str) -> None:
        self.most = 0
        self.plain = 0
        self._database = database

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._count())
        try:
            yield
        finally:
            task.cancel()

    async def _count(self) -> None:
        sql = (
            "SELECT count(*), count(*) FILTER (WHERE NOT ssl) FROM pg_stat_activity"
            " JOIN pg_stat_ssl USING (pid) WHERE datname = current_database()"
            " AND usename <> 'postgres'"
        )
        while True:
            with suppress(psycopg2.Error):  # it is away, on purpose
                await self._count_by(await asyncio.to_thread(psycopg2.connect, self._database), sql)
            await asyncio.sleep(0.2)

    async def _count_by(self, connection: psycopg2.extensions.connection, sql: str) -> None:
        with closing(connection):
            connection.autocommit = True
            while True:
                now, plain = await asyncio.to_thread(_row, connection, sql)
                self.most = max(self.most, now)
                self.plain += plain
                await asyncio.sleep(0.2)


def _row(connection: psycopg2.extensions.connection, sql: str) -> tuple[int, int]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        now, plain = cursor.fetchone() or (0, 0)
        return now, plain


async def test_ten_restarts_under_load(build: Build, tls_postgres: TlsPostgres, seed: int) -> None:
    given, ours = tls_postgres.create_app_database()
    with pytest.raises(psycopg2.OperationalError, match="no encryption"):
        psycopg2.connect(given, sslmode="disable")
    async with running_queue() as queue, Router(port := free_port()).running() as router:
        app = App(build, config(given, queue), port)
        assert (await app.release())[0] == 0
        driver = Driver(lambda: router.url, seed, connections=16)
        connections = Connections(ours)
        try:
            boots = [await app.start()]
            async with connections.counted(), driver.running():
                stops = await ten_restarts(app, driver, queue, tls_postgres, boots)
                await driver.answered(40)
            await driver.settle()
            stops.append(await app.web.stop())  # it falls asleep, and wakes up
            boots.append(await app.start())
            # who died without a word is known by its silence: docs/operations.md, "How soon"
            await queue.emptied(90)
            stops.append(await app.web.stop())
        finally:
            for dyno in app.dynos:
                with suppress(FileNotFoundError):
                    await dyno.crash()
        verdict = await driver.check(ours)
    print(
        f"{len(driver.posts)} POSTs, {verdict.answered} events answered, {verdict.rows} rows,"
        f" {len(verdict.lost)} lost, {len(verdict.doubled)} doubled; boot {max(boots):.1f} s, stop"
        f" {max(stops):.1f} s at the most; {connections.most} connections; peak"
        f" {max(d.peak_bytes for d in app.dynos) / 2**20:.0f} MiB; router {dict(router.errors)}"
    )
    assert connections.most <= OURS < CONNECTIONS
    assert connections.plain == 0
    assert max(dyno.peak_bytes for dyno in app.dynos) < MEMORY_BYTES
    assert max(stops) < STOP_S
    assert router.errors["H12"] == 0
    # all that heard SIGTERM ended well; of those that could not nothing is known
    assert Counter(dyno.code for dyno in app.dynos) == {0: 10, None: 2}
    assert {line["dyno"] for dyno in app.dynos for line in dyno.lines} == {"web.1"}
    assert not [text for dyno in app.dynos for text in dyno.raw if "Traceback" in text]


async def ten_restarts(
    app: App, driver: Driver, queue: Queue, postgres: TlsPostgres, boots: list[float]
) -> list[float]:
    """The seconds that each stop by SIGTERM took."""
    stops: list[float] = []
    for turn in range(10):
        await driver.answered(60)
        if turn == 1:  # the machine under the dyno dies
            await app.web.crash()
        elif turn == 3:  # it hears nothing: the platform ends it (and is less patient here)
            send(tree(app.web.pid), signal.SIGSTOP)
            await app.web.stop(patience_s=2.0)
        elif turn == 5:  # the queue is away meanwhile
            await queue.order(away="closed", away_s=2.0)
            stops.append(await app.web.stop())
        elif turn == 7:  # the database is away at the end, and at the start
            await asyncio.to_thread(postgres.stop)
            stops.append(await app.web.stop())
        else:
            stops.append(await app.web.stop())
        boots.append(await app.start())
        if turn == 7:
            await driver.answered(60)
            await asyncio.to_thread(postgres.start)
    return stops


async def test_a_release_fails_where_a_person_must_act(
    build: Build, tls_postgres: TlsPostgres
) -> None:
    given, _ = tls_postgres.create_app_database()
    wrong_password = given.replace(given.split(":")[2].split("@")[0], "SECRET")
    async with running_queue() as queue:
        app = App(build, config(given, queue), free_port())

        async def fails(words: str, code: int, **changed: str) -> None:
            found, said = await app.release(**changed)
            assert found == code, said
            assert words in said
            assert "Traceback" not in said
            assert "SECRET" not in said

        await asyncio.gather(
            fails("password authentication failed", 1, DATABASE_URL=wrong_password),
            fails("does not exist", 1, DATABASE_URL=given.rpartition("/")[0] + "/nowhere"),
            fails("no encryption", 1, DATABASE_URL=f"{given}?sslmode=disable"),
            fails("wrong credentials", 1, IRON_MQ_TOKEN="x"),
        )
        await asyncio.gather(
            fails("set IRON_MQ_PROJECT_ID and IRON_MQ_TOKEN", 2, IRON_MQ_TOKEN=""),
            fails("no such setting", 2, DATAPIPE_LOAD_INTERVALL="60"),
            fails("no database is named", 2, DATABASE_URL=""),
        )
        await asyncio.to_thread(tls_postgres.stop)
        await queue.order(away="reset")
        code, said = await app.release()  # what is away comes back: no reason not to deploy
        assert code == 0, said
        assert said.count("warn") == 2
