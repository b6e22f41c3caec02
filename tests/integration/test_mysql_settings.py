"""What is set on the way to a server, or done there by others, changes no work of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pymysql
import pytest
from pymysql.constants import CLIENT
from structlog.testing import capture_logs

from datapipe.errors import SinkUnavailable
from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Heartbeat, Table, open_sink
from datapipe.sinks.mysql.connections import LoadConnection
from tests.mariadb import MariaDB

COLUMNS = (Column("n", "bigint"), Column("received_at", "timestamptz"))
ONE = Table("one", COLUMNS)
BEAT = Heartbeat("a", "a", None)


def segment(numbers: range, *, keyed: bool = False) -> Segment:
    """With keys each row is a POST of its own."""
    rows = [f"{n}\t2026-01-02 03:04:05\n".encode() for n in numbers]
    parts, at = [], 0
    for n, row in zip(numbers, rows, strict=True):
        parts.append(Part(f"{n:032x}", f"{n:032x}", 0, at, at + len(row), 1))
        at += len(row)
    return Segment(
        "one", COLUMNS, b"".join(rows), len(rows), tuple(parts) if keyed else (), neutral=True
    )


def there(url: str) -> list[int]:
    return sorted(n for (n,) in MariaDB.execute(url, "SELECT n FROM one"))


@contextmanager
def configured(server: MariaDB, name: str, value: int) -> Iterator[None]:
    """The setting of new sessions, for the block."""
    ((before,),) = server.execute(server.url("mysql"), f"SELECT @@GLOBAL.{name}")
    server.configure(**{name: value})
    try:
        yield
    finally:
        server.configure(**{name: before})


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_limit_of_rows_hides_none(
    mariadb: MariaDB, mysql_database: str, keyed: bool
) -> None:
    segments = [segment(range(n, n + 1), keyed=keyed) for n in range(50)]
    with configured(mariadb, "sql_select_limit", 30):
        async with open_sink(Settings(database_url=mysql_database), "a") as sink:
            await sink.load(ONE, segments[:1])
            loaded = await sink.load(ONE, segments)
            assert (loaded.loaded, loaded.duplicate) == (49, 1)
            ids = {each.id for each in segments}
            assert await sink.loaded(list(ids)) == ids
    assert len(there(mysql_database)) == 50


async def test_safe_updates_stop_no_heartbeat(mariadb: MariaDB, mysql_database: str) -> None:
    with configured(mariadb, "sql_safe_updates", 1):
        async with open_sink(Settings(database_url=mysql_database), "a") as sink:
            await sink.heartbeat(BEAT)
            await sink.expire(["x"])
            await sink.expire_source("b", "a")


async def test_a_proxy_that_has_found_rows_counted_doubles_none(
    mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LoadConnection.__init__

    def proxied(self: LoadConnection, **arguments: object) -> None:
        real(self, **arguments, client_flag=CLIENT.FOUND_ROWS)

    monkeypatch.setattr(LoadConnection, "__init__", proxied)
    first, other = segment(range(3), keyed=True), segment(range(1, 4), keyed=True)
    async with open_sink(Settings(database_url=mysql_database), "a") as sink:
        for each, counts in ((first, (3, 0)), (first, (0, 3)), (other, (1, 2))):
            loaded = await sink.load(ONE, [each])
            assert (loaded.loaded, loaded.duplicate) == counts
    assert there(mysql_database) == [0, 1, 2, 3]


async def test_many_keys_fit_into_small_packets(mariadb: MariaDB, mysql_database: str) -> None:
    many = segment(range(12_000), keyed=True)
    with configured(mariadb, "max_allowed_packet", 1_048_576):  # what `check` lets pass
        async with open_sink(Settings(database_url=mysql_database), "a") as sink:
            loaded = await sink.load(ONE, [many])
            assert (loaded.loaded, loaded.duplicate) == (12_000, 0)
            ids = [f"{n:032x}" for n in range(30_000)]
            assert await sink.loaded([*ids, many.id]) == {many.id}
            await sink.expire([*ids, many.id])
            assert await sink.loaded([*ids, many.id]) == set()


@pytest.mark.parametrize("rows", [1, 50])
async def test_what_expires_does_not_wait_for_loads_under_way(
    mysql_database: str, rows: int
) -> None:
    async with open_sink(Settings(database_url=mysql_database, dedupe_window=0.0), "a") as sink:
        await sink.prepare(ONE)
        old = (
            "INSERT INTO datapipe_ledger (segment, kind, source, lane, process, loaded_at)"
            " SELECT CONCAT(%s, seq), %s, %s, 'one', 'b', UTC_TIMESTAMP() - INTERVAL 40 DAY"
            f" FROM seq_1_to_{rows}"
        )
        kinds = [("claim", None), ("segment", "ironmq"), ("segment", "nats:x"), ("segment", "j")]
        for kind, source in kinds:
            MariaDB.execute(mysql_database, old, f"{kind}:{source}", kind, source)
        with MariaDB.connect(mysql_database, autocommit=False) as other:
            under_way = (
                "INSERT INTO datapipe_ledger (segment, kind, source, lane)"
                " VALUES (%s, %s, %s, 'one')"
            )
            for kind, source in kinds:
                other.cursor().execute(under_way, (f"{kind}:{source}1a", kind, source))
            async with asyncio.timeout(4):  # to wait for a lock takes 5 s
                await sink.heartbeat(BEAT)
                await sink.expire(["x"])
                await sink.expire_lanes("nats:x", {"one": time.time() - 60})
                await sink.expire_source("j", "a")
            other.commit()
    left = MariaDB.execute(mysql_database, "SELECT count(*) FROM datapipe_ledger")
    assert left == [(len(kinds),)]  # what was under way


async def test_what_could_not_be_rolled_back_is_not_committed_by_the_next_load(
    mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LoadConnection.query

    def query(self: LoadConnection, sql: str, *more: object) -> int:
        if sql == "ROLLBACK" or "LOAD DATA" in sql:
            raise pymysql.OperationalError(1317, "Query execution was interrupted")
        return int(real(self, sql, *more))

    first, second = segment(range(1)), segment(range(1, 2))
    async with open_sink(Settings(database_url=mysql_database), "a") as sink:
        await sink.prepare(ONE)
        monkeypatch.setattr(LoadConnection, "query", query)
        with pytest.raises(SinkUnavailable, match="interrupted"):
            await sink.load(ONE, [first])
        monkeypatch.undo()
        await sink.load(ONE, [second])
        assert await sink.loaded([first.id, second.id]) == {second.id}
        await sink.load(ONE, [first])
    assert there(mysql_database) == [0, 1]


async def test_the_log_names_the_server_that_it_is(mysql_database: str) -> None:
    with capture_logs() as logged:
        async with open_sink(Settings(database_url=mysql_database), "a") as sink:
            await sink.heartbeat(BEAT)
    (up,) = (each for each in logged if each["event"] == "database up")
    assert up["product"] == "MariaDB"
    assert up["version"] == sink.state().version is not None
