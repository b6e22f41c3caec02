"""Whatever statement a server answers with a request for a file: it gets a load's rows, or none."""

from __future__ import annotations

import socket
from pathlib import Path

import pymysql
import pytest

from datapipe.errors import SinkUnavailable
from datapipe.settings import Settings
from datapipe.sinks import open_sink
from datapipe.sinks.mysql import connections
from datapipe.sinks.mysql.connections import connected
from datapipe.sinks.mysql.sink import MySqlSink
from datapipe.sinks.urls import server_address
from tests.doubles import mysql_server
from tests.doubles.mysql_server import MySqlServer

LOAD = "LOAD DATA LOCAL INFILE 'rows' INTO TABLE t"
SECRET = Path("/etc/passwd").read_bytes()


@pytest.mark.parametrize("at", ["SET NAMES utf8mb4 COLLATE", "SET SESSION", "START", "SELECT"])
def test_a_load_s_connection_gives_no_file_where_none_was_offered(at: str) -> None:
    with MySqlServer.running(lambda statement: statement.startswith(at)) as server:
        with pytest.raises(pymysql.OperationalError, match="asks for a file"):
            connection = connected(server_address(server.url, 0))
            for statement in ("START TRANSACTION", "SAVEPOINT piece", "SELECT 1"):
                connection.query(statement)
        assert server.received == []


def test_an_answer_that_makes_no_sense_is_an_error_of_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other would end the process."""
    monkeypatch.setattr(mysql_server, "_GREETING", b"\x0a8.0.1")
    with (
        MySqlServer.running(lambda statement: False) as server,
        pytest.raises(pymysql.OperationalError, match="can't connect"),
    ):
        connected(server_address(server.url, 0))


def test_a_server_that_takes_connections_and_says_nothing_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "_CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mysql://app@127.0.0.1:{silent.getsockname()[1]}/events"
        with pytest.raises(pymysql.OperationalError, match="timed out"):
            connected(server_address(url, 0))


def test_whatever_file_is_asked_for_the_load_s_rows_are_sent_and_once() -> None:
    rows = b"1\t2\n" * 50_000
    with MySqlServer.running(lambda statement: "LOAD" in statement) as server:
        connection = connected(server_address(server.url, 0))
        connection.load(LOAD, rows)
        assert server.received == [rows]
        connection.load(LOAD, b"")
        assert server.received == [rows, b""]
        with pytest.raises(pymysql.OperationalError, match="asks for a file"):
            connection.query(LOAD)  # no rows were offered for it
        assert not connection.open
        assert server.received == [rows, b""]


def test_what_a_load_did_not_take_is_not_left_for_the_next_statement() -> None:
    with MySqlServer.running(lambda statement: statement == "SELECT 1") as server:
        connection = connected(server_address(server.url, 0))
        connection.load(LOAD, b"rows")  # the server asks for nothing
        with pytest.raises(pymysql.OperationalError, match="asks for a file"):
            connection.query("SELECT 1")
        assert server.received == []


@pytest.mark.parametrize("at", ["SET NAMES utf8mb4 COLLATE", "SHOW GLOBAL", "SELECT"])
async def test_nor_does_the_pool_give_one(at: str) -> None:
    with MySqlServer.running(lambda statement: statement.startswith(at)) as server:
        async with open_sink(Settings(database_url=server.url), "one") as sink:
            assert isinstance(sink, MySqlSink)
            with pytest.raises(SinkUnavailable, match="asks for a file"):
                await sink.query(f"{at} 1")
            assert sink.state().up is False
        assert server.statements
        assert SECRET not in b"".join(server.received)
        assert server.received == []
