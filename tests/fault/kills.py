"""SIGKILL at chosen moments, again and again, under load: of a service, of the database."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.databases import Server, aexecute, make_refusing
from tests.fault.driver import Driver, Verdict
from tests.fault.moments import Moment, Moments, cut
from tests.fault.proxy import moments_of
from tests.service import Service, until

# None: at any time, most likely while something is being appended
MOMENTS = (None, *Moment)

_REFUSED_EACH = 50  # of the ids in the table of one lane
_REFUSING = "install"

MakeService = Callable[..., Service]


def is_refused(lane: str, id: int) -> bool:
    """Whether a `Fleet`'s tables refuse it."""
    return lane == _REFUSING and id % _REFUSED_EACH == 0


@dataclass(slots=True)
class Fleet:
    """Services on one new database, some of whose rows it refuses, and what tells their moments."""

    database: str
    services: list[Service]
    moments: list[Moments]
    driver: Driver
    unbalanced: int = 0

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        server: Server,
        make_service: MakeService,
        chance: random.Random,
        count: int = 1,
        connections: int = 16,
    ) -> AsyncIterator[Fleet]:
        """They share a data_dir, and adopt what a dead one leaves. Started; killed in the end."""
        database = await asyncio.to_thread(server.create_database)
        await asyncio.to_thread(make_refusing, database, _REFUSING, _REFUSED_EACH)
        async with AsyncExitStack() as stack:
            moments = [await stack.enter_async_context(moments_of(database)) for _ in range(count)]
            services = [
                each.service(
                    make_service, load_interval=0.1, load_min_interval=0,
                    load_trigger_bytes=20_000, event_modules=["tests.fault.modules.quick_recovery"],
                )
                for each in moments
            ]  # fmt: skip
            data_dir = services[0].settings["data_dir"]
            for service in services:
                service.settings["data_dir"] = data_dir
                await service.start()
            driver = Driver(
                lambda: chance.choice(services).url, chance.getrandbits(32),
                connections=connections, batch=20, refuses=is_refused, waits=0.2,
            )  # fmt: skip
            yield cls(database, services, moments, driver)
            for service in services:
                await service.kill()

    async def look(self) -> None:
        """Count the books that do not balance now."""
        for service in self.services:
            self.unbalanced += not await books_balance(service)

    async def enough(self) -> None:
        """Wait until what must not go wrong was there: a key used twice, a refused row, a wait."""

        async def there() -> bool:
            posts = [post for post in self.driver.posts if post.answered]
            refused = any(is_refused(*each) for post in posts for each in post.events)
            waited = any(post.waits for post in posts)
            return refused and waited and any(post.answered > 1 for post in posts)

        await until(there, what="a key used twice, a refused row, and a wait")

    async def check(self) -> Verdict:
        """Load all that waits, and compare; AssertionError if an event is not where it must be."""
        await self.driver.settle()
        for service in self.services:
            await drained(service)
        await self.look()
        verdict = await self.driver.check(self.database)
        assert not self.unbalanced, f"the books did not balance {self.unbalanced} times"
        assert verdict.duplicates_by_key, "no key was used twice: the test tests less than it says"
        assert verdict.dead, "no row was refused: the test tests less than it says"
        await ledger_forgets(self.database)
        return verdict


async def kill_at(
    service: Service, moments: Moments, moment: Moment | None, delay_s: float
) -> None:
    """SIGKILL at the next such moment, and a little later where `delay_s` says so."""
    if moment is None:
        await asyncio.sleep(delay_s * 20)
    else:

        async def act() -> bool:
            if moment is Moment.TOLD:  # from here on the segments are removed from the journal
                await asyncio.sleep(delay_s)
            os.kill(service.pid, signal.SIGKILL)
            return moment is not Moment.COMMIT

        await moments.at(moment, act)
    await service.kill()


async def crash_at(
    server: Server, moments: Moments, moment: Moment | None, delay_s: float, passes: bool
) -> None:
    """End the database in the same way. Args: passes: what was to happen then may still."""

    async def act() -> bool:
        await asyncio.to_thread(server.crash)
        return passes

    if moment is None:
        await asyncio.sleep(delay_s * 20)
        await act()
    else:
        await moments.at(moment, act)


async def books_balance(service: Service) -> bool:
    """Whether the sum comes out, while events keep coming."""
    books: dict[str, Any] = (await service.status())["books"]
    went = sum(books[key] for key in ("loaded", "duplicate", "dead", "waiting"))
    return bool(books["balanced"] and books["accepted"] + books["recovered"] == went)


async def drained(service: Service, stuck_s: float = 60.0) -> None:
    """Wait until nothing waits, however long it takes, as long as it gets less."""
    least, until_s = math.inf, 0.0
    while waiting := (status := await service.status())["books"]["waiting"]:
        if waiting < least:
            least, until_s = waiting, time.monotonic() + stuck_s
        assert time.monotonic() < until_s, (status["summary"], status["lanes"])
        await asyncio.sleep(0.05)


async def ledger_forgets(database: str) -> None:
    """Once the journal is empty no segment need be known any more, of dead processes neither."""

    async def forgotten() -> bool:
        count = "SELECT count(*) FROM datapipe_ledger WHERE kind = 'segment'"
        return (await aexecute(database, count))[0][0] == 0

    await until(forgotten, what="a ledger without segments")


async def loads(service: Service, more: int = 2) -> None:
    """Wait for some more loads."""
    before = len(service.logged("segments loaded"))

    async def there() -> bool:
        return len(service.logged("segments loaded")) >= before + more

    await until(there, what="more loads")


def shuffled(chance: random.Random, count: int) -> Iterable[Moment | None]:
    """So many moments, each about as often."""
    rounds = (chance.sample(MOMENTS, len(MOMENTS)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(rounds), count)


async def kill_many(
    server: Server,
    make_service: MakeService,
    chance: random.Random,
    kills: int,
    *,
    restart_every: int = 0,
    services: int = 1,
    connections: int = 16,
) -> dict[str, int]:
    """So many kills on one new database; AssertionError if an event is lost or doubled.

    Args:
        restart_every: kills until the database itself crashes or restarts, in between.
        services: on one data_dir, any of which is killed; the others load what it leaves.
        connections: that post.
    """
    restarts = 0
    async with Fleet.running(server, make_service, chance, services, connections) as fleet:
        async with fleet.driver.running():
            for number, moment in enumerate(shuffled(chance, kills), 1):
                await fleet.driver.answered(chance.randint(5, 40))
                index = chance.randrange(services)
                victim = fleet.services[index]
                if restart_every and number % restart_every == 0:
                    how = chance.choice([server.stop, server.crash])
                    await asyncio.to_thread(how)
                    if chance.random() < 0.5:  # killed while the database is away, too
                        await victim.kill()
                        await victim.start()
                        await fleet.driver.answered(10)
                    await asyncio.to_thread(server.start)
                    restarts += 1
                await kill_at(victim, fleet.moments[index], moment, chance.uniform(0, 0.005))
                await victim.start()
                await fleet.look()
            await fleet.enough()
        verdict = await fleet.check()
    return {"kills": kills, "restarts": restarts, **figures(verdict)}


async def crash_many(
    server: Server, make_service: MakeService, chance: random.Random, crashes: int
) -> dict[str, int]:
    """The same for the database, while the service goes on."""
    async with Fleet.running(server, make_service, chance) as fleet:
        (service,), (moments,), driver = fleet.services, fleet.moments, fleet.driver
        async with driver.running():
            for moment in shuffled(chance, crashes):
                await driver.answered(chance.randint(5, 40))
                await crash_at(
                    server, moments, moment, chance.uniform(0, 0.005), chance.random() < 0.5
                )
                await driver.answered(10)  # events are taken all the same
                await asyncio.to_thread(server.start)
                await loads(service)
                await fleet.look()
            await fleet.enough()
        verdict = await fleet.check()
        counts_right(await service.drained(), verdict)
    return {"kills": crashes, "restarts": 0, **figures(verdict)}


async def cut_many(
    server: Server, make_service: MakeService, chance: random.Random, cuts: int
) -> dict[str, int]:
    """The same for connections, around COMMIT; of a file: its disk fails."""
    async with Fleet.running(server, make_service, chance) as fleet:
        (service,), (moments,), driver = fleet.services, fleet.moments, fleet.driver
        async with driver.running():
            for _ in range(cuts):
                moment = chance.choice([Moment.COMMIT, Moment.SENT, Moment.COMMITTED])
                await moments.at(moment, cut)
                await loads(service, 1)
                await fleet.look()
            await fleet.enough()
        verdict = await fleet.check()
        counts_right(await service.drained(), verdict)
    return {"kills": cuts, "restarts": 0, **figures(verdict)}


def counts_right(books: dict[str, Any], verdict: Verdict) -> None:
    """Whether a service that lived all the time says what is true."""
    assert books["balanced"], books
    assert books["accepted"] == verdict.answered + verdict.unanswered_stored, (books, verdict)
    assert books["loaded"] == verdict.rows, (books, verdict)
    assert books["duplicate"] == verdict.duplicates_by_key, (books, verdict)
    assert books["dead"] == verdict.dead, (books, verdict)


def figures(verdict: Verdict) -> dict[str, int]:
    """Those of the tables that the long run prints; `accepted`: each event once."""
    return {
        "answered": verdict.answered, "lost": len(verdict.lost), "doubled": len(verdict.doubled),
        "duplicates_by_key": verdict.duplicates_by_key, "unbalanced": 0,
        "accepted": verdict.answered - verdict.duplicates_by_key + verdict.unanswered_stored,
        "rows": verdict.rows, "distinct": verdict.distinct, "dead": verdict.dead,
    }  # fmt: skip
