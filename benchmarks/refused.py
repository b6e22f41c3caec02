"""Loads of 100,000 rows, some of which the table refuses, beside a load that it takes.

With a line number (a CHECK) PostgreSQL says which row it was; without one (a foreign key) the rows
are halved until it is found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.measure import Bench, Contest, Goal, Sample, in_turn
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Table, open_sink
from tests.postgres import Postgres

TITLE = "Refused rows"
ROWS = 100_000
GOALS = {"one refused": 0.5, "1 % refused": 1 / 20, "1 % refused, no line": 1 / 30}
_TABLE = Table(
    "refusing", (Column("n", "bigint"), Column("t", "text"), Column("received_at", "timestamptz"))
)
_CLEAN = "clean"
_CHECK = "ALTER TABLE refusing ADD CHECK (n <> -1)"
_FOREIGN_KEY = (
    "CREATE TABLE good (n bigint PRIMARY KEY); INSERT INTO good VALUES (1);"
    "ALTER TABLE refusing ADD FOREIGN KEY (n) REFERENCES good"
)


def segments(bad: int, rows: int = ROWS) -> list[Segment]:
    """One row in so many is bad, spread evenly; 10 segments."""
    every = rows // bad if bad else 0
    lines = [
        b"%d\ta text of some length\t2026-01-01 00:00:00\n" % (-1 if bad and n % every == 7 else 1)
        for n in range(rows)
    ]
    size = rows // 10
    return [
        Segment("refusing", _TABLE.columns, b"".join(lines[i : i + size]), size)
        for i in range(0, rows, size)
    ]


def seconds(postgres: Postgres, constraint: str, bad: int, rows: int = ROWS) -> float:
    """How long one load takes."""
    database = postgres.create_database()
    loading = segments(bad, rows)

    async def load() -> float:
        async with open_sink(Settings(database_url=database), "benchmark") as sink:
            await sink.prepare(_TABLE)
            if constraint:
                await postgres.aexecute(database, constraint)
            started = time.perf_counter()
            result = await sink.load(_TABLE, loading)
            took = time.perf_counter() - started
        if (result.loaded, result.dead) != (rows - bad, bad):
            raise RuntimeError(f"{bad} of {rows} rows are bad; the load says {result}")
        return took

    return asyncio.run(load())


def measure(bench: Bench) -> Iterator[Contest]:
    def load(constraint: str, bad: int) -> Sample:
        return {"rate": ROWS / seconds(bench.postgres, constraint, bad)}

    cases = {
        "one refused": (_CHECK, 1),
        "1 % refused": (_CHECK, ROWS // 100),
        "1 % refused, no line": (_FOREIGN_KEY, ROWS // 100),
    }
    for name, (constraint, bad) in cases.items():
        rivals = {name: partial(load, constraint, bad), _CLEAN: partial(load, constraint, 0)}
        goal = Goal(f"load, {name} / clean", name, _CLEAN, least=GOALS[name])
        yield in_turn(name, rivals, bench, [goal])
