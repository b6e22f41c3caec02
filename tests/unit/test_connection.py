"""The way to the database: TLS on a dyno, and which failures no setting could mend."""

from __future__ import annotations

import psycopg2
import pytest
from psycopg2.extensions import parse_dsn

from datapipe.sinks.postgres.connections import connection_dsn
from datapipe.sinks.postgres.errors import is_away

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


def test_what_is_no_error_of_the_database_is_not_away() -> None:
    assert not is_away(None)
    assert not is_away(OSError("Connection refused"))
