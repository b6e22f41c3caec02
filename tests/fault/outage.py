"""A long outage: the database is away for minutes, events keep coming, memory stays flat.

Run by `python -m tests.fault.torture` at full length, by `test_outage.py` for seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.postgres import Postgres
from tests.service import Service, until

LIMIT_BYTES = 512 * 1024 * 1024
LANES = ("crash_report", "purchase", "install")
_CONNECTIONS = 16


@dataclass(slots=True)
class Outage:
    """What was measured; times in seconds, memory in MB (10^6 bytes) of the service."""

    seconds: float
    posted: int = 0
    refused: int = 0
    rate: float = 0.0
    rss_start_mb: float = 0.0  # a third into the outage
    rss_end_mb: float = 0.0
    peak_mb: float = 0.0
    journal_mb: float = 0.0
    slowest_answer_s: float = 0.0
    loaded_in_s: float = 0.0
    rows: int = 0
    distinct: int = 0


class Pace:
    """Posts so many events a second, some alone and some in batches; ids count up."""

    def __init__(
        self, service: Service, events_a_second: int, batch: int, text: str = "it broke"
    ) -> None:
        self.posted = 0
        self.refused = 0
        self.slowest_s = 0.0
        self._service = service
        self._rate = events_a_second
        self._batch = batch
        self._text = text
        self._ids = itertools.count(1)
        self._stopping = False

    async def run(self) -> None:
        """Until `stop`. Each connection has its share of the pace, and makes up for lost time."""
        await asyncio.gather(*(self._work(number) for number in range(_CONNECTIONS)))

    def stop(self) -> None:
        self._stopping = True

    async def _work(self, number: int) -> None:
        started, sent = time.monotonic() + number / _CONNECTIONS, 0
        for turn in itertools.count(number):
            if self._stopping:
                return
            count = 1 if turn % 2 else self._batch
            ahead = started + sent * _CONNECTIONS / self._rate - time.monotonic()
            await asyncio.sleep(max(0.0, ahead))
            began = time.monotonic()
            await self._post(LANES[turn % len(LANES)], count)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            sent += count

    async def _post(self, lane: str, count: int) -> None:
        extra = {"crash_report": {"message": self._text}, "purchase": {"sku": "sku-1"}}
        events = [
            {"event_name": lane, "user_id": id, "timestamp": 1, **extra.get(lane, {})}
            for id in itertools.islice(self._ids, count)
        ]
        status, _ = await self._service.post(json.dumps(events))
        if status == 200:
            self.posted += count
        else:
            self.refused += count


def rss_mb(pid: int, what: str = "VmRSS") -> float:
    """Resident memory now, or its highest mark with `VmHWM`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(what)


async def outage(
    postgres: Postgres,
    make_service: Callable[..., Service],
    seconds: float,
    *,
    events_a_second: int = 2000,
    batch: int = 100,
    text: str = "it broke",
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Outage:
    """Load something, take the database away, post for so long, bring it back, load all."""
    database = postgres.create_database()
    service = await make_service(database_url=database, load_interval=5, **settings).start()
    # what the process may have of its own: heap, and anonymous mappings of all its threads
    resource.prlimit(service.pid, resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    result = Outage(seconds)
    pace = Pace(service, events_a_second, batch, text)
    async with asyncio.TaskGroup() as group:
        group.create_task(pace.run())

        async def loads() -> bool:
            return bool(service.logged("segments loaded"))

        await until(loads, what="a first load")
        await asyncio.to_thread(postgres.stop)
        before, began = pace.posted, time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0:
            await asyncio.sleep(min(left, max(seconds / 60, 0.2)))
            now = rss_mb(service.pid)
            if time.monotonic() - began <= max(seconds / 3, 2.0):
                result.rss_start_mb = now
            say(f"outage {time.monotonic() - began:.0f} s: {pace.posted} posted, {now:.0f} MB")
        result.rate = (pace.posted - before) / (time.monotonic() - began)
        result.rss_end_mb = rss_mb(service.pid)
        pace.stop()
    result.posted, result.refused = pace.posted, pace.refused
    result.slowest_answer_s = pace.slowest_s
    result.journal_mb = (await service.status())["mirror"]["bytes"] / 1e6
    await asyncio.to_thread(postgres.start)
    back = time.monotonic()
    books = await service.drained(600)
    result.loaded_in_s = time.monotonic() - back
    assert books["balanced"], books
    result.peak_mb = rss_mb(service.pid, "VmHWM")
    assert await service.stop() == 0
    union = " UNION ALL ".join(f"SELECT user_id FROM {lane}" for lane in LANES)
    sql = f"SELECT count(*), count(DISTINCT user_id) FROM ({union}) AS everything"
    ((result.rows, result.distinct),) = await postgres.aexecute(database, sql)
    return result
