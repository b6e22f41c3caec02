"""What clients and people change while it runs: keys used twice, settings, types, processes.

Two services share a database and a data_dir. Clients send bodies again, under the same key and
under one that another body has; they wait for rows; types come and go with a restart; SIGHUP
changes ingest keys while both are in use; a service is killed. Whatever was accepted must be a row
or a dead letter, once; whatever was refused each time must be nowhere.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.databases import execute, has
from tests.service import Service, until

LATER = "signup"  # a type that is registered in some settings, and kept as unknown in others
_LONG = 3000  # characters; more than some settings take
_TIMEOUT = aiohttp.ClientTimeout(total=40)
MakeService = Callable[..., Service]


@dataclass(slots=True)
class Sent:
    """A body, and what became of each of its events by the answers."""

    ids: list[int]
    body: bytes
    key: str | None
    accepted: set[int] = field(default_factory=set)
    unsure: bool = False  # a try was answered 503, or by nothing: it may be stored


@dataclass(slots=True)
class Found:
    """Counts for the table, and the ids of events that broke the promise."""

    sent: int = 0
    accepted: int = 0
    rows: int = 0
    kept: int = 0
    dead: int = 0
    reused: int = 0
    waited: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)
    refused_stored: list[int] = field(default_factory=list)
    told_too_early: list[int] = field(default_factory=list)

    def check(self) -> None:
        assert not self.lost, f"{len(self.lost)} lost: {self.lost[:10]}"
        assert not self.doubled, f"{len(self.doubled)} doubled: {self.doubled[:10]}"
        assert not self.refused_stored, f"refused, yet stored: {self.refused_stored[:10]}"
        assert not self.told_too_early, f"not there, as told: {self.told_too_early[:10]}"


class Clients:
    """Post to both services, with one of the ingest keys that are valid at the moment."""

    def __init__(self, services: list[Service], keys: list[str], chance: random.Random) -> None:
        self.sent: list[Sent] = []
        self.found = Found()
        self.faults: list[str] = []
        self._services = services
        self._keys = keys
        self._chance = chance
        self._ids = itertools.count(1)
        self._stopping = False

    @asynccontextmanager
    async def running(self, connections: int, database: str) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
            work = [asyncio.create_task(self._work(session, database)) for _ in range(connections)]
            try:
                yield
            finally:
                self._stopping = True
                await asyncio.gather(*work)

    async def _work(self, session: aiohttp.ClientSession, database: str) -> None:
        while not self._stopping:
            sent = self._next()
            loaded = await self._send(session, sent)
            if loaded and self._chance.random() < 0.2:
                stored = await asyncio.to_thread(stored_ids, database)
                self.found.told_too_early += [id for id in loaded if not stored[id]]
            await asyncio.sleep(self._chance.uniform(0, 0.03))

    def _next(self) -> Sent:
        draw = self._chance.random()
        keyed = [sent for sent in self.sent[-200:] if sent.key]
        if keyed and draw < 0.25:
            return self._chance.choice(keyed)  # the same again
        key = f"key-{next(self._ids)}" if draw < 0.7 else None
        if keyed and draw < 0.32:
            key = self._chance.choice(keyed).key  # with another body
            self.found.reused += 1
        ids = [next(self._ids) for _ in range(self._chance.randint(1, 30))]
        body = "\n".join(json.dumps(self._event(id)) for id in ids).encode()
        self.sent.append(Sent(ids, body, key))
        return self.sent[-1]

    def _event(self, id: int) -> dict[str, Any]:
        kind = self._chance.choice(["install", "purchase", "crash_report", LATER, LATER])
        made: dict[str, Any] = {"event_name": kind, "user_id": id, "timestamp": 7 * id}
        if kind == "purchase":
            made["sku"] = "s"
        if kind == "crash_report":
            made["message"] = "m" * self._chance.choice([1, _LONG])
        return made

    async def _send(self, session: aiohttp.ClientSession, sent: Sent) -> set[int]:
        """The events that were said to be loaded."""
        service = self._chance.choice(self._services)
        headers = {"Authorization": f"Bearer {self._chance.choice(self._keys)}"}
        if sent.key:
            headers["Idempotency-Key"] = sent.key
        if self._chance.random() < 0.2:
            headers["Prefer"] = "wait=5"
        try:
            async with session.post(f"{service.url}/", data=sent.body, headers=headers) as response:
                answer = await response.json()
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL):
            await asyncio.sleep(0.1)
            return set()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            sent.unsure = True
            return set()
        status, taken = response.status, set[int]()
        self.found.statuses[status] += 1
        if status in (200, 202, 207):
            refused = {error["index"] for error in answer.get("errors", ())}
            assert len(refused) == answer.get("rejected", 0)
            taken = {id for index, id in enumerate(sent.ids) if index not in refused}
            sent.accepted |= taken
        elif status == 503:
            sent.unsure = True
        elif status not in (400, 422):
            self.faults.append(f"{status}: {answer}")
        self.found.waited += bool(answer.get("loaded"))
        return taken if answer.get("loaded") else set()

    def judge(self, database: str) -> Found:
        found, stored = self.found, stored_ids(database)
        assert not self.faults, self.faults[:5]
        found.rows, found.kept, found.dead = counts(database)
        for sent in self.sent:
            found.sent += len(sent.ids)
            found.accepted += len(sent.accepted)
            for id in sent.ids:
                if stored[id] > 1:
                    found.doubled.append(id)
                if id in sent.accepted and not stored[id]:
                    found.lost.append(id)
                if stored[id] and id not in sent.accepted and not sent.unsure:
                    found.refused_stored.append(id)
        return found


_TABLES = ("install", "purchase", "crash_report", LATER)
_IN_JSON = {"datapipe_unknown": "event", "datapipe_dead_letters": "event"}


def stored_ids(database: str) -> Counter[int]:
    """How often each event is anywhere."""
    ids: Counter[int] = Counter()
    for table in _TABLES:
        if has(database, table):
            ids.update(id for (id,) in execute(database, f"SELECT user_id FROM {table}"))
    for table in _IN_JSON:
        if has(database, table):
            sql = f"SELECT (event->>'user_id')::bigint, event->>'event' FROM {table}"
            for id, inner in execute(database, sql):
                ids[id if id is not None else json.loads(inner)["user_id"]] += 1
    return ids


def counts(database: str) -> tuple[int, int, int]:
    """Rows, kept events of unknown types, dead letters."""
    there = [table for table in (*_TABLES, *_IN_JSON) if has(database, table)]
    of = {t: execute(database, f"SELECT count(*) FROM {t}")[0][0] for t in there}
    kept, dead = of.pop("datapipe_unknown", 0), of.pop("datapipe_dead_letters", 0)
    return sum(of.values()), kept, dead


def variant(chance: random.Random) -> dict[str, Any]:
    """Settings that a restart may bring."""
    made: dict[str, Any] = {
        "input_max_len": chance.choice([2048, 16384]),
        "unknown_events": chance.choice(["keep", "reject"]),
        "events": {},
    }
    if chance.random() < 0.5:
        fields = {"user_id": "int", "timestamp": "int"}
        made["events"] = {LATER: {**fields, "@partition": "day", "@retention": "30 days"}}
    return made


async def change(
    database: str, make_service: MakeService, chance: random.Random, times: int
) -> Found:
    """Change something so many times under load, then compare."""
    common = {
        "database_url": database, "load_interval": 0.2, "load_min_interval": 0.05,
        "event_modules": ["tests.fault.modules.quick_recovery"],
    }  # fmt: skip
    services = [make_service(**common, **variant(chance)) for _ in range(2)]
    keys = ["first"]
    for service in services:
        service.settings["data_dir"] = services[0].settings["data_dir"]
        write(service, keys)
        await service.start()
    clients = Clients(services, keys, chance)
    async with clients.running(12, database):
        for _ in range(times):
            await asyncio.sleep(chance.uniform(0.3, 1.0))
            what = chance.choice([rotate, restart, restart, killed])
            await what(services, keys, chance)
    for service in services:
        await until(service_answers(service), 30)
    # whatever the last settings are, what waits of a type that one of them knows is loaded by it
    for service in services:
        await service.stop()
        service.settings |= {"unknown_events": "keep", "events": registered()}
        write(service, keys)
        await service.start()
    await services[0].drained(60)
    await services[1].drained(60)
    return await asyncio.to_thread(clients.judge, database)


def registered() -> dict[str, Any]:
    return {LATER: {"user_id": "int", "timestamp": "int", "@partition": "day"}}


def write(service: Service, keys: Iterable[str]) -> None:
    """The settings file, with these ingest keys: of one name, so idempotency keys are shared."""
    lanes = ["install", "purchase", "crash_report", "datapipe_unknown", *service.settings["events"]]
    service.settings["ingest_keys"] = [
        {"name": "app", "key": key, "rate": 1_000_000, "lanes": lanes} for key in keys
    ]
    service.file.write_text(json.dumps(service.settings))


async def rotate(services: list[Service], keys: list[str], chance: random.Random) -> None:
    """Both keys are valid before clients change over, and until they have."""
    old, new = keys[0], f"k{chance.getrandbits(32)}"
    await reload(services, [old, new])
    keys[:] = [new, old]
    await asyncio.sleep(0.2)
    keys[:] = [new]
    await asyncio.sleep(0.5)  # POSTs under way still have the old one
    await reload(services, [new])


async def reload(services: list[Service], keys: list[str]) -> None:
    for service in services:
        before = len(service.logged("settings reloaded"))
        write(service, keys)
        service.send_signal(signal.SIGHUP)

        async def told(service: Service = service, before: int = before) -> bool:
            return len(service.logged("settings reloaded")) > before

        await until(told, 20, "settings reloaded")


async def restart(services: list[Service], keys: list[str], chance: random.Random) -> None:
    service = chance.choice(services)
    await service.stop()
    await comes_back(service, keys, chance)


async def killed(services: list[Service], keys: list[str], chance: random.Random) -> None:
    service = chance.choice(services)
    await service.kill()
    await comes_back(service, keys, chance)


async def comes_back(service: Service, keys: list[str], chance: random.Random) -> None:
    """With other settings."""
    service.settings |= variant(chance)
    write(service, keys)
    await service.start()


def service_answers(service: Service) -> Callable[[], Any]:
    async def answers() -> bool:
        with suppress(aiohttp.ClientError):
            return (await service.get("/readyz"))[0] == 200
        return False

    return answers
