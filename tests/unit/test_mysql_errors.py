"""What MySQL's and MariaDB's errors say to people."""

from __future__ import annotations

import pymysql

from datapipe.sinks.mysql.errors import described


def test_no_right_on_the_database_names_the_grant() -> None:
    said = "Access denied for user 'collector'@'10.0.0.%' to database 'a`b'"
    text, code = described(pymysql.err.OperationalError(1044, said))
    assert code == "error 1044"
    assert text.startswith(f"{said}: ")
    assert text.endswith("CREATE, ALTER, INDEX ON `a``b`.* TO 'collector'@'10.0.0.%'")


def test_a_wrong_password_names_none() -> None:
    said = "Access denied for user 'collector'@'localhost' (using password: YES)"
    assert described(pymysql.err.OperationalError(1045, said)) == (said, "error 1045")
