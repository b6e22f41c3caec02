"""A synchronous standby: what it has not confirmed stays in the mirror, whatever COMMIT says.
At last a URL that names both hosts.

The standby is stopped, so that a COMMIT on the primary waits for it; that wait is then ended in
each of the ways there are, the primary dies, and the standby, which got nothing of it, is promoted.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from datapipe.settings import Settings
from datapipe.sinks import open_sink
from tests.fault.proxy import Proxy
from tests.fault.test_database import check_all, loads, summary_is, under_load
from tests.postgres import Postgres
from tests.service import Service, until

MakeService = Callable[..., Service]
OFTEN = {"load_interval": 0.1, "load_min_interval": 0, "load_workers": 1}
WAITING = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND pid <> pg_backend_pid()"


@dataclass(slots=True)
class Pair:
    """A primary and its synchronous standby, and the one address at which the service meets them.

    The database says `synchronous_commit = off`: what a load relies on is for the load to say.
    """

    primary: Postgres
    standby: Postgres
    database: str
    proxy: Proxy

    async def a_commit_waits(self, call: str = "pid") -> None:
        """Wait until a COMMIT waits for the standby; call a function of the server on its `pid`."""

        async def one() -> bool:
            return bool(await self.primary.aexecute(self.database, f"SELECT {call} {WAITING}"))

        await until(one, what="a COMMIT that waits for the standby")

    async def fail_over(self) -> str:
        """The primary is gone for good, the standby in its place; the URL of the database there."""
        await asyncio.to_thread(self.primary.stop, signal.SIGQUIT)
        await asyncio.to_thread(self.standby.start)
        await asyncio.to_thread(self.standby.promote)
        there = self.standby.url(self.database.rpartition("/")[2])
        self.proxy.lead_to(there)
        return there


@pytest.fixture
async def pair(own_postgres: Postgres) -> AsyncIterator[Pair]:
    database = own_postgres.create_database()
    name = database.rpartition("/")[2]
    own_postgres.execute(database, f"ALTER DATABASE {name} SET synchronous_commit = off")
    standby = Postgres(of=own_postgres)
    try:
        standby.start()
        own_postgres.configure(synchronous_standby_names="standby")
        async with Proxy(database).running() as proxy:
            yield Pair(own_postgres, standby, database, proxy)
    finally:
        standby.remove()


async def standby_away(pair: Pair, service: Service) -> None:
    """A service that has loaded 100 events, and has 100 more in a load that waits."""
    await service.start()
    assert (await service.post(events(0)))[0] == 200
    await service.drained()
    await asyncio.to_thread(pair.standby.stop)
    assert (await service.post(events(100)))[0] == 200
    await pair.a_commit_waits()


def events(first: int) -> list[dict[str, object]]:
    return [
        {"event_name": "install", "user_id": id, "timestamp": 1} for id in range(first, first + 100)
    ]


async def rows(pair: Pair, database: str) -> tuple[int, int]:
    """How many there are, and how many different ones."""
    sql = "SELECT count(*), count(DISTINCT user_id) FROM install"
    ((count, distinct),) = await pair.primary.aexecute(database, sql)
    return count, distinct


async def cancelled(pair: Pair, service: Service) -> None:
    """COMMIT returns, with a WARNING, and the service has heard of it."""
    before = len(service.logged("load failed"))

    async def heard() -> bool:
        return len(service.logged("load failed")) > before

    await pair.a_commit_waits("pg_cancel_backend(pid)")
    await until(heard, what="a load that failed")


async def terminated(pair: Pair, service: Service) -> None:
    """The connection is lost; the rows are there all the same."""
    await pair.a_commit_waits("pg_terminate_backend(pid)")


async def crashed(pair: Pair, service: Service) -> None:
    """The same, by a crash of the primary."""
    await asyncio.to_thread(pair.primary.stop, signal.SIGQUIT)
    await asyncio.to_thread(pair.primary.start)


async def killed(pair: Pair, service: Service) -> None:
    """Another process takes over, and has never heard of that COMMIT."""
    await service.kill()
    await terminated(pair, service)
    await service.start()


@pytest.mark.parametrize("ended", [cancelled, terminated, crashed, killed])
async def test_what_the_standby_never_got_outlives_the_primary(
    pair: Pair, make_service: MakeService, ended: Callable[[Pair, Service], Awaitable[None]]
) -> None:
    service = make_service(database_url=pair.proxy.url, **OFTEN)
    await standby_away(pair, service)
    await ended(pair, service)
    await pair.a_commit_waits()  # one more: that the ledger knows it proves nothing
    assert (await service.status())["books"]["waiting"] == 100
    there = await pair.fail_over()
    await service.drained()
    assert await rows(pair, there) == (200, 200)


async def test_a_standby_that_comes_back_confirms_what_was_committed_before(
    pair: Pair, make_service: MakeService
) -> None:
    """However often the wait for it was ended: what a load of ours did counts as loaded."""
    service = make_service(database_url=pair.proxy.url, **OFTEN)
    await standby_away(pair, service)
    for end in (cancelled, cancelled, terminated):
        await end(pair, service)
    await pair.a_commit_waits()
    await asyncio.to_thread(pair.standby.start)
    books = await service.drained()
    assert (books["loaded"], books["duplicate"]) == (200, 0)
    assert await rows(pair, pair.database) == (200, 200)
    assert len(service.logged("load failed")) == 3


async def test_what_waits_for_the_standby_is_named_and_nothing_else_waits(
    pair: Pair, make_service: MakeService
) -> None:
    """A new lane gets its table, and the heartbeat goes on; the database is not called away."""
    name = pair.database.rpartition("/")[2]
    reset = f"ALTER DATABASE {name} RESET synchronous_commit"
    await pair.primary.aexecute(pair.database, reset)
    modules = ["tests.fault.modules.quick_slow", "tests.fault.modules.quick_watch"]
    service = make_service(
        database_url=pair.proxy.url, event_modules=modules, **OFTEN | {"load_workers": 2}
    )
    await standby_away(pair, service)
    purchase = {"event_name": "purchase", "user_id": 1, "timestamp": 2, "sku": "tea"}
    assert (await service.post(purchase))[0] == 200
    lanes = ("install", "purchase")

    async def named() -> bool:
        told = (await service.status())["lanes"]
        slow = [told.get(lane, {}).get("slow_load") for lane in lanes]
        return all(load and load["waits_for"] == "IPC: SyncRep" for load in slow)

    async def beats() -> int:
        ((count,),) = await pair.primary.aexecute(
            pair.database, "SELECT coalesce(max(beats), 0) FROM datapipe_processes"
        )
        return int(count)

    await until(named, what="two slow loads")
    before = await beats()

    async def beaten() -> bool:
        return await beats() >= before + 5

    await until(beaten, what="five more beats")
    status = await service.status()
    assert all(status["lanes"][lane]["slow_load"]["seconds"] >= 1 for lane in lanes)
    assert status["summary"]["state"] == "lane_slow"
    for text, lane in zip(
        (status["summary"]["text"], *status["summary"]["also"]), lanes, strict=True
    ):
        assert text.startswith(f"A load of {lane} has been under way since ")
        assert "COMMIT waits for the synchronous standby (IPC: SyncRep)" in text
        assert "synchronous_standby_names" in text
    assert not service.logged("database down")
    await asyncio.to_thread(pair.standby.start)
    await service.drained()
    status = await service.status()
    assert status["summary"]["state"] == "healthy"
    assert [status["lanes"][lane]["slow_load"] for lane in lanes] == [None, None]


async def test_a_url_of_both_hosts_follows_the_primary(
    pair: Pair, make_service: MakeService, seed: int
) -> None:
    """Killed under load; nobody touches the service while the standby is promoted."""
    hosts = f"127.0.0.1:{pair.standby.port},127.0.0.1:{pair.primary.port}"
    name = pair.database.rpartition("/")[2]
    url = f"postgresql://postgres@{hosts}/{name}?target_session_attrs=read-write"
    service = make_service(
        database_url=url, event_modules=["tests.fault.modules.quick_watch"],
        **OFTEN | {"load_trigger_bytes": 20_000},
    )  # fmt: skip
    there = pair.standby.url(name)

    async def beats() -> int:
        sql = "SELECT coalesce(max(beats), 0) FROM datapipe_processes"
        return int((await pair.standby.aexecute(there, sql))[0][0])

    async with under_load(service, seed) as driver:
        await asyncio.to_thread(pair.primary.stop, signal.SIGKILL)
        await summary_is(service, "database_down")
        await driver.answered(50)
        async with open_sink(Settings(database_url=url), "check") as sink:
            ((level, text),) = await sink.check([])
        assert level == "away", text  # a release is not held up meanwhile
        await asyncio.to_thread(pair.standby.promote)
        before = await beats()
        await loads(service)

        async def beaten() -> bool:
            return await beats() >= before + 3

        await until(beaten, what="three beats there")
        await summary_is(service, "healthy")
    await check_all(driver, service, there)
