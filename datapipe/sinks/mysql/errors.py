"""What follows from an error code of the server: the one table of it.

Source of the codes: MySQL and MariaDB documentation, "Server Error Message Reference" and "MariaDB
Error Code Reference"; those from 2000 to 2999 are the client's.
"""

from __future__ import annotations

import re

import pymysql

from datapipe.sinks.verdict import Verdict

_CODES = {
    Verdict.DOWN: (
        *range(2000, 3000), 0,  # no connection
        1040, 1203, 1226,  # too many connections; too much for this account
        1044, 1045, 1129, 1130, 1251, 1698, 1820, 3118, 4151,  # may not log in
        1049,  # no such database
        1047,  # Galera: this node is not in the cluster now
        1053, 1077, 1079, 1080, 1158, 1159, 1160, 1161, 1184, 1927, 4031,  # ended or killed
        1290, 1792, 1836,  # read-only
        3, 11, 20, 28, 1021, 1026, 1030, 1037, 1038, 1041, 1135, 1180, 3675,  # disk, memory, I/O
    ),
    Verdict.LATER: (
        1020, 1205, 1206, 1213, 1223, 1412, 1479, 1614, 1637, 3572, 3058,  # locks, deadlock
        1114,  # "table is full": also a full disk
        1317, 1969, 3024,  # interrupted; took too long
        1050, 1060, 1061, 1826,  # somebody else has just made it
    ),
    Verdict.MISSING: (1054, 1146, 1142, 1143),  # a right may be missing, too
    Verdict.ROW: (
        1048, 1062, 1216, 1263, 1264, 1265, 1292, 1364, 1365, 1366, 1367, 1406, 1411, 1416, 1441,
        1452, 1526, 1561, 1586, 1591, 1644, 1690, 1748, 1761, 1762, 1859, 3140, 3141, 3156, 3819,
        3903, 4025, 4037, 4038, 4039, 4040, 4078,
    ),
}  # fmt: skip
_BY_CODE = {code: verdict for verdict, codes in _CODES.items() for code in codes}

_AWAY = (2002, 2003, 2006, 2013, 1040, 1053, 1203, 1226)

_ENDED = (1053, 1077, 1079, 1080, 1927, 4031)  # the connection is closed with it

_ENTRY = re.compile("entry '.*' for key")

_NO_RIGHT_THERE = re.compile(r"Access denied for user ('.*'@'.*') to database '(.*)'")  # 1044

_REMEDIES = {
    1148: "set local_infile = ON in the server's settings",
    3948: "set local_infile = ON in the server's settings",
    4166: "set local_infile = ON in the server's settings",
    1665: "set binlog_format = ROW or MIXED in the server's settings",
}


def code_of(exc: BaseException) -> int:
    """The server's or the client's error code; 0: none."""
    code = exc.args[0] if exc.args else 0
    return code if isinstance(code, int) else 0


def verdict(exc: pymysql.MySQLError) -> Verdict:
    """What an error means; one without a code usually is a lost connection."""
    return _BY_CODE.get(code_of(exc), Verdict.BLOCKED)


def may_be_of_a_row(exc: pymysql.MySQLError) -> bool:
    """Whether a row may be to blame.

    It may for a code that only a trigger's SIGNAL gives, which has its SQLSTATE from there.
    """
    state = getattr(exc, "sqlstate", None) or ""
    signalled = code_of(exc) not in _BY_CODE and state[:2] not in ("", "HY", "42")
    return signalled or verdict(exc) is Verdict.ROW


def is_away(exc: BaseException | None) -> bool:
    """Whether the server does not answer now, or has no room: not a matter of settings."""
    return isinstance(exc, pymysql.MySQLError) and code_of(exc) in _AWAY


def has_answered(exc: BaseException) -> bool:
    """Whether it is what the server said, and not the end of the connection, or its silence."""
    code = code_of(exc)
    return code != 0 and not 2000 <= code < 3000 and code not in _ENDED


def without_value(text: str) -> str:
    """What the server says of a duplicate, for logs: without the value of the row."""
    return _ENTRY.sub("entry for key", text)


def described(exc: BaseException) -> tuple[str, str]:
    """The first line of what the server said, with the remedy if there is one; its code."""
    code = code_of(exc)
    said = str(exc.args[-1] if exc.args else "").strip() or type(exc).__name__
    text = without_value(" ".join(said.split("\n")[0].split()))
    if remedy := _REMEDIES.get(code) or _grant_for(text):
        text = f"{text}: {remedy}"
    return text, f"error {code}"


def _grant_for(text: str) -> str:
    """What lets an account in that has no right on a database, not even to know of it."""
    if not (found := _NO_RIGHT_THERE.fullmatch(text)):
        return ""
    account, database = found[1], found[2].replace("`", "``")
    rights = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX"
    return f"if there is one of this name, GRANT {rights} ON `{database}`.* TO {account}"
