"""What a MariaDB server may be like, and what becomes of loads: settings, rights, TLS, errors."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pymysql
import pytest
import trustme
import uvloop

from datapipe.errors import ConfigError, LaneBlocked, SinkUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.settings import Settings
from datapipe.sinks import Heartbeat, Selection, Table, open_sink
from datapipe.sinks.mysql import connections
from datapipe.sinks.mysql.connections import LoadConnection
from datapipe.sinks.mysql.errors import verdict
from datapipe.sinks.mysql.sink import MySqlSink
from datapipe.sinks.urls import server_address
from datapipe.sinks.verdict import Verdict
from tests.mariadb import MariaDB

N, T, RECEIVED = Column("n", "bigint"), Column("t", "text"), Column("received_at", "timestamptz")
ONE, OTHER = (Table(name, (N, T, RECEIVED)) for name in ("one", "other"))
BEAT = Heartbeat("a", "a", None)


def segment(*numbers: int, lane: str = "one") -> Segment:
    data = "".join(f"{n}\ttext\t2026-01-02 03:04:05\n" for n in numbers).encode()
    return Segment(lane, ONE.columns, data, len(numbers), neutral=True)


def opened(url: str, process: str = "a") -> Any:
    return open_sink(Settings(database_url=url), process)


@pytest.fixture
async def sink(mysql_database: str) -> AsyncIterator[MySqlSink]:
    async with opened(mysql_database) as sink:
        await sink.prepare(ONE)
        await sink.prepare(OTHER)
        yield sink


def there(url: str, lane: str = "one") -> list[int]:
    return [n for (n,) in MariaDB.execute(url, f"SELECT n FROM {lane} ORDER BY n")]


async def failing(sink: MySqlSink, *tables: Table) -> list[str]:
    return [text for level, text in await sink.check(tables or (ONE,)) if level != "ok"]


# --- settings of the server ---


@pytest.fixture(scope="module")
def hurt() -> Iterator[MariaDB]:
    """A server whose settings these tests change, and set back."""
    with MariaDB.running(
        innodb_flush_method="nosync", log_bin="bin", sync_binlog="1", server_id="1"
    ) as server:
        yield server


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("innodb_flush_log_at_trx_commit", 2, 1),
        ("innodb_flush_log_at_trx_commit", 0, 1),
        ("sync_binlog", 0, 1),
        ("binlog_format", "STATEMENT", "MIXED"),
    ],
)
async def test_a_server_that_would_lose_what_is_loaded_gets_nothing(
    hurt: MariaDB, name: str, value: Any, good: Any
) -> None:
    url = hurt.create_database()
    async with opened(url) as sink:
        await sink.load(ONE, [segment(1)])
        assert await failing(sink) == []
        hurt.configure(**{name: value})
        try:
            (said,) = await failing(sink)
            assert f"{name} is {value}" in said
            with pytest.raises(SinkUnavailable, match=name) as refused:
                await sink.load(ONE, [segment(2)])
            assert refused.value.everywhere
            with pytest.raises(SinkUnavailable, match=name):
                await sink.heartbeat(BEAT)  # which would say that it is up
            assert (sink.state().up, name in (sink.state().error or "")) == (False, True)
        finally:
            hurt.configure(**{name: good})
        await sink.load(ONE, [segment(2)])
        assert (sink.state().up, there(url)) == (True, [1, 2])


async def test_a_server_without_local_infile_blocks_and_says_what_to_set(hurt: MariaDB) -> None:
    url = hurt.create_database()
    async with opened(url) as sink:
        await sink.load(ONE, [segment(1)])
        hurt.configure(local_infile=0)
        try:
            assert "local_infile" in (await failing(sink))[0]
            with pytest.raises(LaneBlocked, match="set local_infile = ON"):
                await sink.load(ONE, [segment(2)])
        finally:
            hurt.configure(local_infile=1)
        await sink.load(ONE, [segment(2)])
        assert there(url) == [1, 2]


async def test_small_packets_are_found(hurt: MariaDB) -> None:
    hurt.configure(max_allowed_packet=262_144)
    try:
        async with opened(hurt.create_database()) as sink:
            assert "max_allowed_packet is 262144" in (await failing(sink))[0]
    finally:
        hurt.configure(max_allowed_packet=16_777_216)


async def test_whatever_the_server_s_defaults_are_the_session_has_its_own(hurt: MariaDB) -> None:
    was = {
        name: hurt.execute(hurt.url("mysql"), f"SELECT @@global.{name}")[0][0]
        for name in ("sql_mode", "time_zone", "tx_isolation", "lc_messages", "sql_notes")
    }
    odd = ("ANSI,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT", "+05:00", "SERIALIZABLE", "de_DE", 0)
    hurt.configure(**dict(zip(was, odd, strict=True)))
    try:
        url = hurt.create_database()
        async with opened(url) as sink:
            data = b"1\ta\\\\b'\\t\\n\t2026-01-02 03:04:05\n"
            await sink.load(ONE, [Segment("one", ONE.columns, data, 1, neutral=True)])
            assert hurt.execute(url, "SELECT t FROM one") == [("a\\b'\t\n",)]
            assert abs(await sink.now() - time.time()) < 60
            assert sink._pool._free
            (row,) = await sink.query("SELECT @@tx_isolation, @@wait_timeout, @@lc_messages")
            assert row == ("READ-COMMITTED", 60, "en_US")
    finally:
        hurt.configure(**was)


async def test_a_table_that_rolls_nothing_back_blocks_its_lane(
    sink: MySqlSink, mysql_database: str
) -> None:
    MariaDB.execute(mysql_database, "ALTER TABLE one ENGINE = MyISAM")
    with pytest.raises(LaneBlocked, match="MyISAM"):
        await sink.load(ONE, [segment(1)])
    assert "MyISAM" in (await failing(sink))[0]
    await sink.load(OTHER, [segment(1, lane="other")])
    MariaDB.execute(mysql_database, "ALTER TABLE one ENGINE = InnoDB")
    await sink.load(ONE, [segment(1)])
    assert there(mysql_database) == [1]


# --- rights ---

_GRANTS = re.compile(r"GRANT .+$")


async def test_what_is_lacking_is_said_with_the_statement_that_grants_it(
    mariadb: MariaDB, mysql_database: str
) -> None:
    """From an account without rights to one that loads, by what `check` prints."""
    name = mysql_database.rpartition("/")[2]
    account = f"'{name}'@'127.0.0.1'"
    mariadb.execute(mysql_database, f"CREATE USER {account} IDENTIFIED BY 'pä:ss@/?#'")
    mariadb.execute(mysql_database, f"GRANT USAGE ON *.* TO {account}")
    mariadb.execute(mysql_database, "CREATE TABLE seen (n INT)")
    mariadb.execute(mysql_database, f"GRANT SELECT ON `{name}`.seen TO {account}")  # to get in
    url = mysql_database.replace("root@", f"{name}:p%C3%A4%3Ass%40%2F%3F%23@")
    async with opened(url) as sink:
        granted = []
        for _ in range(8):
            said = await failing(sink)
            for each in said:
                assert f"{name}@127.0.0.1 has no right to" in each
                granted += _GRANTS.findall(each)
                mariadb.execute(mysql_database, granted[-1])
            if not said:
                break
        await sink.load(ONE, [segment(1)])
        assert await failing(sink) == []
        mariadb.execute(mysql_database, f"REVOKE INSERT ON one FROM {account}")
        with pytest.raises(LaneBlocked, match=r"no right to INSERT: GRANT INSERT ON .* TO"):
            await sink.load(ONE, [segment(2)])
        mariadb.execute(mysql_database, f"GRANT INSERT ON one TO {account}")
        await sink.load(ONE, [segment(2)])
    assert there(mysql_database) == [1, 2]
    assert not any("ALL" in each or "FILE" in each for each in granted)


@pytest.mark.parametrize("grant", ["*.*", "`{like}`.*", "`{name}`.*"])
async def test_wide_grants_are_enough(mariadb: MariaDB, mysql_database: str, grant: str) -> None:
    name = mysql_database.rpartition("/")[2]
    to = grant.format(name=name, like=name[:-1] + "_")
    mariadb.execute(mysql_database, f"CREATE USER {name}")
    mariadb.execute(mysql_database, f"GRANT ALL ON {to} TO {name}")
    async with opened(mysql_database.replace("root@", f"{name}@")) as sink:
        assert await failing(sink) == []
        await sink.load(ONE, [segment(1)])
        assert await failing(sink) == []


@pytest.mark.parametrize("account", ["collector", "loader"])
async def test_the_rights_that_the_docs_name_are_enough(
    mariadb: MariaDB, mysql_database: str, account: str
) -> None:
    name = mysql_database.rpartition("/")[2]
    page = (Path(__file__).parents[2] / "docs/databases.md").read_text()
    grants = re.findall(rf"`(GRANT [^`]+ TO {account})`", page)
    mariadb.execute(mysql_database, f"CREATE USER {name}")
    if account == "loader":
        async with opened(mysql_database) as administrator:
            await administrator.prepare(ONE)
        (ledger,) = (each for each in grants if "ledger" in each)
        grants += [ledger.replace("ledger", each) for each in ("dead_letters", "processes")]
    for grant in grants:
        here = grant.replace("events.", f"{name}.").replace("crash_report", "one")
        mariadb.execute(mysql_database, here.replace(account, name))
    async with opened(mysql_database.replace("root@", f"{name}@")) as sink:
        assert await failing(sink) == []
        await sink.load(ONE, [segment(1)])
        await sink.heartbeat(BEAT)
        await sink.expire([])
        assert await sink.replay(Selection(), {"one": ONE}, lambda *_: b"") == ({}, 0)
        if account == "collector":
            await sink.prepare(Table("one", (N, T, Column("more", "text"), RECEIVED)))


# --- TLS, and the URL ---


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def secured(
    authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MariaDB, Path]]:
    certificate = authority.issue_cert("127.0.0.1")
    server = MariaDB(innodb_flush_method="nosync")
    for name, pem in (
        ("ca", authority.cert_pem), ("key", certificate.private_key_pem),
        ("cert", certificate.cert_chain_pems[0]),
    ):  # fmt: skip
        pem.write_to_path(str(server.folder / f"{name}.pem"))
        (server.folder / f"{name}.pem").chmod(0o644)
        server.options[f"ssl_{name}"] = str(server.folder / f"{name}.pem")
    try:
        server.start()
        yield server, server.folder / "ca.pem"
    finally:
        server.remove()


@pytest.mark.parametrize(
    ("options", "cipher"),
    [
        ("", True),
        ("?ssl-mode=DISABLED", False),
        ("?ssl-mode=required", True),
        ("?ssl-ca={ca}", True),
        ("?ssl-mode=VERIFY_IDENTITY&ssl-ca={ca}", True),
    ],
)
@pytest.mark.parametrize("loop", [asyncio, uvloop])
def test_both_drivers_speak_tls(
    secured: tuple[MariaDB, Path], options: str, cipher: bool, loop: Any
) -> None:
    server, ca = secured
    url = server.create_database()

    async def ciphers() -> list[bool]:
        async with opened(url + options.format(ca=ca)) as sink:
            await sink.load(ONE, [segment(1)])
            ask = "SHOW STATUS LIKE 'Ssl_cipher'"
            rows = await sink.query(ask)
            loads = sink._loads._take_idle()
            rows += loads.rows(ask)
            loads.close()
            return [bool(value) for _, value in rows]

    assert loop.run(ciphers()) == [cipher, cipher]


@pytest.mark.parametrize("mode", ["VERIFY_CA", "VERIFY_IDENTITY"])
async def test_a_server_of_another_authority_is_not_trusted(
    secured: tuple[MariaDB, Path], tmp_path: Path, mode: str
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    server, _ = secured
    url = f"{server.create_database()}?ssl-mode={mode}&ssl-ca={tmp_path / 'other.pem'}"
    async with opened(url) as sink:
        with pytest.raises(SinkUnavailable, match="certificate verify failed"):
            await sink.now()


async def test_a_server_without_tls_is_refused_where_it_is_required(mysql_database: str) -> None:
    url = f"{mysql_database}?ssl-mode=REQUIRED"
    async with opened(url) as sink:
        with pytest.raises(SinkUnavailable, match="SSL is required"):
            await sink.now()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://host", "must be like mysql://user"),
        ("mysql://host:port/db", "can't be read"),
        ("mysql://host/db?sslmode=require", "'sslmode' is not one of ssl-mode"),
        ("mysql://host/db?ssl-mode=maybe", "ssl-mode is not one of DISABLED"),
        ("mysql://user:hush@host/db?ssl-ca=/nowhere", "No such file"),
    ],
)
def test_a_wrong_url_is_said_without_its_password(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as wrong:
        server_address(url, 3306)
    assert "hush" not in str(wrong.value)
    assert "hush" not in repr(server_address("mysql://user:hush@host/db", 3306))


# --- errors, class by class ---

# what is done to the table, what mends it, the verdict
HARMS = {
    "view": (
        "RENAME TABLE one TO one_t;"
        " CREATE VIEW one AS SELECT n + 0 AS n, t, received_at FROM one_t",
        "DROP VIEW one; RENAME TABLE one_t TO one",
        "blocked",
    ),
    "dropped": ("DROP TABLE one", "", "loaded"),
    "less": ("ALTER TABLE one DROP t", "", "loaded"),
    "no_default": ("ALTER TABLE one ADD x INT NOT NULL", "ALTER TABLE one DROP x", "blocked"),
    "lock_wait": ("", "", "later 1205"),
    "deadlock": ("", "", "later 1213"),
    "read_only": ("", "", "down 1290"),
    "disk_full": ("", "", "later 1114"),
    "ended": ("", "", "later 1317"),
    "of_nobody": ("", "", "dead 31000"),
    "custom": ("", "", "dead 1644"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
async def test_errors_of_a_load(sink: MySqlSink, mysql_database: str, harm: str) -> None:
    hurts, mends, outcome = HARMS[harm]
    outcome, _, code = outcome.partition(" ")
    if code:
        state = "HY000" if outcome != "dead" else "45000"
        hurts = (
            "CREATE TRIGGER odd BEFORE INSERT ON one FOR EACH ROW SIGNAL SQLSTATE"
            f" '{state}' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'said'"
        )
        mends = "DROP TRIGGER odd"
    for statement in hurts.split("; "):
        MariaDB.execute(mysql_database, statement)
    if outcome in ("loaded", "dead"):
        loaded = await sink.load(ONE, [segment(1)])
        assert (loaded.loaded, loaded.dead) == ((1, 0) if outcome == "loaded" else (0, 1))
    elif outcome == "blocked":
        with pytest.raises(LaneBlocked):
            await sink.load(ONE, [segment(1)])
    else:
        with pytest.raises(SinkUnavailable) as refused:
            await sink.load(ONE, [segment(1)])
        assert refused.value.everywhere == (outcome == "down")
        assert (sink.state().up is False) == (outcome == "down")
    await sink.load(OTHER, [segment(1, lane="other")])
    for statement in filter(None, mends.split("; ")):
        MariaDB.execute(mysql_database, statement)
    await sink.load(ONE, [segment(2)])
    assert there(mysql_database) == ([1, 2] if outcome == "loaded" else [2])


async def test_a_locked_table_waits_alone(
    sink: MySqlSink, mysql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_LOAD_LOCK_S", 1)
    with MariaDB.connect(mysql_database) as other:
        other.cursor().execute("LOCK TABLES one WRITE")
        loading = asyncio.create_task(sink.load(ONE, [segment(1)]))
        while not (waits := await sink.waits()):
            await asyncio.sleep(0.02)
        assert "metadata lock" in waits["one"].event
        await sink.load(OTHER, [segment(1, lane="other")])
        with pytest.raises(SinkUnavailable, match="Lock wait timeout") as refused:
            await loading
        assert not refused.value.everywhere
    await sink.load(ONE, [segment(1)])


async def test_an_abort_ends_a_load_at_once(sink: MySqlSink, mysql_database: str) -> None:
    with MariaDB.connect(mysql_database) as other:
        other.cursor().execute("LOCK TABLES one WRITE")
        loading = asyncio.create_task(sink.load(ONE, [segment(1)]))
        while not await sink.waits():
            await asyncio.sleep(0.02)
        began = time.perf_counter()
        sink.abort()
        with pytest.raises(SinkUnavailable):
            await loading
        assert time.perf_counter() - began < 5  # it would have waited for 10 s


async def test_the_fence_is_judged_when_the_ledger_is_written(
    sink: MySqlSink, mysql_database: str
) -> None:
    with MariaDB.connect(mysql_database) as other:
        other.cursor().execute("LOCK TABLES datapipe_ledger WRITE")
        not_after = await sink_now(mysql_database) + 0.5
        late = asyncio.create_task(sink.load(ONE, [segment(1)], not_after=not_after))
        while not await sink.waits():
            await asyncio.sleep(0.02)
        assert await sink_now(mysql_database) < not_after  # so it began before
        while await sink_now(mysql_database) < not_after:
            await asyncio.sleep(0.05)
    with pytest.raises(SinkUnavailable, match="held for too long"):
        await late


async def sink_now(url: str) -> float:
    return float(MariaDB.execute(url, "SELECT UNIX_TIMESTAMP(SYSDATE(6))")[0][0])


@pytest.mark.parametrize("where", ["within the rows", "between two statements"])
async def test_who_freezes_holds_others_no_longer_than_a_time_out(
    sink: MySqlSink, mysql_database: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its segments are loaded by another process, once the server has ended its session."""
    short = tuple(
        each.replace("net_read_timeout = 30", "net_read_timeout = 1").replace(
            "wait_timeout = 60", "wait_timeout = 1", 1
        )
        for each in connections._SESSION
    )
    monkeypatch.setattr(connections, "_SESSION", short)
    frozen, thaws = threading.Event(), threading.Event()
    real = LoadConnection.write_packet

    def freezes(self: Any, packet: bytes) -> None:
        if not frozen.is_set() and packet.startswith(b"1\ttext"):
            if where == "within the rows":
                real(self, packet[:5])
            else:  # all of it is there, and no COMMIT comes
                real(self, packet)
                real(self, b"")
            frozen.set()
            thaws.wait(20)
        else:
            real(self, packet)

    monkeypatch.setattr(LoadConnection, "write_packet", freezes)
    async with opened(mysql_database, "b") as other:
        held = segment(1)
        first = asyncio.create_task(sink.load(ONE, [held]))
        await asyncio.to_thread(frozen.wait, 10)
        assert (await other.load(ONE, [held])).loaded == 1
        thaws.set()
        with suppress(SinkUnavailable):
            await first
    assert there(mysql_database) == [1]


async def test_a_server_that_restarts_is_found_again(own_mariadb: MariaDB) -> None:
    url = own_mariadb.create_database()
    async with opened(url) as sink:
        await sink.load(ONE, [segment(1)])
        await asyncio.to_thread(own_mariadb.stop)
        for work in (sink.load(ONE, [segment(2)]), sink.heartbeat(BEAT)):
            with pytest.raises(SinkUnavailable):
                await work
        assert sink.state().up is False
        assert [level for level, _ in await sink.check([ONE])] == ["away"]
        await asyncio.to_thread(own_mariadb.start)
        await sink.heartbeat(BEAT)
        assert sink.state().up is True
        await sink.load(ONE, [segment(3)])
        sink.answer_within_s = 0.5
        own_mariadb.freeze()
        with pytest.raises(SinkUnavailable, match="no answer"):
            await sink.heartbeat(BEAT)
        own_mariadb.thaw()
        await sink.heartbeat(BEAT)
    assert there(url) == [1, 3]


async def test_a_session_that_the_server_has_ended_is_not_used_again(
    sink: MySqlSink, mysql_database: str
) -> None:
    for n in (1, 2):
        await sink.load(ONE, [segment(n)])
        await sink.heartbeat(BEAT)
        name = mysql_database.rpartition("/")[2]
        sql = (
            "SELECT id FROM information_schema.processlist WHERE db = %s AND id <> CONNECTION_ID()"
        )
        for (thread,) in MariaDB.execute(mysql_database, sql, name):
            MariaDB.execute(mysql_database, f"KILL {thread}")
    assert there(mysql_database) == [1, 2]


async def test_heartbeats_of_many_do_not_stop_each_other(mysql_database: str) -> None:
    """Their transactions look at each other's rows: of two that deadlock, one is repeated."""
    async with opened(mysql_database, "p") as first:
        await first.heartbeat(BEAT)
        beats = [Heartbeat(f"p{n}", f"m{n}", None) for n in range(4)]
        for _ in range(15):
            await asyncio.gather(*(first.heartbeat(beat) for beat in beats))


def test_each_verdict_has_codes() -> None:
    found = {verdict(pymysql.OperationalError(code, "")) for code in range(70_00)}
    assert found == set(Verdict)
