"""The way to the database: TLS on a dyno, and which failures no setting could mend."""

from __future__ import annotations

import psycopg2
import pymysql
import pytest
from psycopg2.extensions import parse_dsn

from datapipe.sinks.mysql import errors as mysql_errors
from datapipe.sinks.postgres.connections import connection_dsn
from datapipe.sinks.postgres.errors import has_answered, is_away, one_line

AT = 'connection to server at "h" (10.0.0.1), port 5432 failed: '


@pytest.mark.parametrize(
    ("url", "env", "sslmode"),
    [
        ("postgres://h/d", {}, None),
        ("postgres://h/d", {"DYNO": "web.1"}, "require"),
        ("postgres://u:a?b@h/d", {"DYNO": "web.1"}, "require"),
        ("postgres://h/d?sslmode=verify-full", {"DYNO": "web.1"}, "verify-full"),
        ("postgres://h/d?sslmode=disable", {"DYNO": "web.1"}, "disable"),
        ("postgres://h/d", {"DYNO": "web.1", "PGSSLMODE": "verify-ca"}, "verify-ca"),
    ],
)
def test_a_dyno_speaks_tls_to_its_database(
    url: str, env: dict[str, str], sslmode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DYNO", "PGSSLMODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert parse_dsn(connection_dsn(url)).get("sslmode") == sslmode


@pytest.mark.parametrize(
    ("said", "away"),
    [
        (AT + "Connection refused\n\tIs the server running on that host?", True),
        (AT + "timeout expired", True),
        (AT + "FATAL:  the database system is starting up", True),
        (AT + 'FATAL:  too many connections for role "u"', True),
        (AT + 'FATAL:  password authentication failed for user "u"', False),
        (AT + 'FATAL:  database "x" does not exist', False),
        (AT + 'FATAL:  no pg_hba.conf entry for host "10.0.0.1", no encryption', False),
        (AT + "server does not support SSL, but SSL was required", False),
        ('could not translate host name "x" to address: Name or service not known', False),
        # two addresses of one host: the second answers
        (AT + "Connection refused\n" + AT + 'FATAL:  role "u" does not exist', False),
        (AT + "Connection refused\n" + AT + "No route to host", True),
    ],
)
def test_what_is_away_and_what_refuses_us(said: str, away: bool) -> None:
    assert is_away(psycopg2.OperationalError(said)) is away


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        (AT + "Connection refused\n\tIs the server running on that host?", False),
        (AT + "timeout expired", False),
        (AT + "server closed the connection unexpectedly", False),
        ('could not translate host name "x" to address: Name or service not known', False),
        (AT + "FATAL:  the database system is starting up", True),
        (AT + 'FATAL:  password authentication failed for user "u"', True),
        (AT + "\u0424\u0410\u0422\u0410\u041b\u042c\u041d\u041e:  no", True),
        (AT + "session is read-only", True),
        (AT + "Connection refused\n" + AT + 'FATAL:  role "u" does not exist', True),
        (AT + "Connection refused\n" + AT + "timeout expired", False),
    ],
)
def test_what_the_server_says_is_told_from_its_silence(said: str, answered: bool) -> None:
    assert has_answered(psycopg2.OperationalError(said)) is answered


def test_of_two_addresses_of_a_host_the_one_that_answers_is_heard() -> None:
    fatal = AT + 'FATAL:  role "u" does not exist'
    refused = AT + "Connection refused\n\tIs the server running on that host?"
    for said, told in (
        (f"{refused}\n{fatal}\n", " ".join(fatal.split())),
        (f"{refused}\n{AT}timeout expired\n", AT + "Connection refused"),
        ("", "OperationalError"),
    ):
        assert one_line(psycopg2.OperationalError(said)) == told


@pytest.mark.parametrize(
    ("code", "answered"),
    [(2003, False), (2013, False), (0, False), (1053, False), (1045, True), (1040, True),
     (1290, True), (4031, False)],
)  # fmt: skip
def test_the_same_of_mariadb(code: int, answered: bool) -> None:
    assert mysql_errors.has_answered(pymysql.OperationalError(code, "x")) is answered


def test_what_is_no_error_of_the_database_is_not_away() -> None:
    assert not is_away(None)
    assert not is_away(OSError("Connection refused"))
