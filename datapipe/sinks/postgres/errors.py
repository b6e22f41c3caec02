"""What follows from an SQLSTATE: the one table of it.

Source of the classes: PostgreSQL documentation, appendix "PostgreSQL Error Codes".
"""

from __future__ import annotations

import re

import psycopg2

from datapipe.sinks.verdict import Verdict

_BY_STATE = {
    "42P01": Verdict.MISSING,  # undefined table
    "42703": Verdict.MISSING,  # undefined column
    "3F000": Verdict.MISSING,  # no such schema
    "42501": Verdict.MISSING,  # insufficient privilege
    "55P03": Verdict.LATER,  # lock not available
    "55006": Verdict.LATER,  # object in use
    "25P03": Verdict.LATER,  # idle in transaction for too long
    "25P04": Verdict.LATER,  # transaction took too long
    "57014": Verdict.LATER,  # query cancelled
}

_BY_CLASS = {
    "08": Verdict.DOWN,  # connection
    "25": Verdict.DOWN,  # read-only transaction and the like
    "28": Verdict.DOWN,  # authorization
    "3D": Verdict.DOWN,  # no such database
    "40": Verdict.LATER,  # deadlock, serialization failure
    "53": Verdict.DOWN,  # disk full, too many connections, out of memory
    "57": Verdict.DOWN,  # shut down by the operator
    "58": Verdict.DOWN,  # system error: an I/O error of the server
    "XX": Verdict.DOWN,  # internal error
    "3F": Verdict.BLOCKED,
    "42": Verdict.BLOCKED,  # wrong types, not a table
    "22": Verdict.ROW,  # data
    "23": Verdict.ROW,  # integrity
    "54": Verdict.ROW,  # limit exceeded
    "P0": Verdict.ROW,  # raised by a trigger
}


def verdict(exc: psycopg2.Error) -> Verdict:
    """What an error means; one without a code usually is a lost connection."""
    code = exc.pgcode
    if code is None:
        return Verdict.ROW if isinstance(exc, psycopg2.DataError) else Verdict.DOWN
    if code in _BY_STATE:
        return _BY_STATE[code]
    return _BY_CLASS.get(code[:2], Verdict.BLOCKED)


def may_be_of_a_row(exc: psycopg2.Error) -> bool:
    """Whether a row may be to blame; it may for an unlisted code, which a trigger can raise."""
    code = exc.pgcode
    unlisted = code is not None and code not in _BY_STATE and code[:2] not in _BY_CLASS
    return unlisted or verdict(exc) is Verdict.ROW


def is_unrouted(exc: psycopg2.Error) -> bool:
    """Whether there is no partition for a row.

    It bears the code of a violated CHECK, which alone names its constraint. Source: PostgreSQL,
    `ExecFindPartition` in execPartition.c; documentation, "Error and Notice Message Fields".
    """
    diag = exc.diag
    return exc.pgcode == "23514" and bool(diag.table_name) and not diag.constraint_name


# libpq gives no SQLSTATE for a connection that it could not make, so the text decides
_AWAY_CLASSES = ("08", "53", "57")
_AWAY_WORDS = re.compile(
    "Connection refused|timeout expired|timed out|no answer in time|unreachable|No route to host"
    "|reset by peer|closed the connection|Temporary failure in name resolution|starting up"
    "|shutting down|recovery mode|not yet accepting|too many|slots are reserved"
    "|session is read-only|hot standby mode"  # of several hosts the primary is not there yet
    "|no more connections allowed|login has been failing|query_wait_timeout"  # PgBouncer's
)

# Of a connection that libpq could not make: what the server said comes behind its severity and two
# blanks, whatever its language. Source: PostgreSQL, `pqBuildErrorMessage3` in fe-protocol3.c; of
# several hosts, `target_session_attrs` in fe-connect.c.
_SAID = re.compile(r"failed: (?:\S+:  |session is |server is )")
_ENDED = ("57P01", "57P02", "57P05")  # the connection is closed with it

# What a pooler says in its own words, and what a person can do.
_REMEDIES = {
    "unsupported startup parameter": "a pooler refuses it: take it out of database_url (and"
    " PGOPTIONS), set it by ALTER ROLE ... SET instead, or name it in ignore_startup_parameters",
}


def is_away(exc: BaseException | None) -> bool:
    """Whether the server does not answer now, or has no room: not a matter of settings."""
    if not isinstance(exc, psycopg2.Error):
        return False
    if exc.pgcode:
        return exc.pgcode[:2] in _AWAY_CLASSES
    tried = str(exc).split("connection to server")  # once for each address of the host
    return all(_AWAY_WORDS.search(each) for each in tried if each.strip())


def has_answered(exc: psycopg2.Error) -> bool:
    """Whether it is what the server said, and not the end of the connection, or its silence."""
    if exc.pgcode:
        return exc.pgcode[:2] != "08" and exc.pgcode not in _ENDED
    return bool(_SAID.search(_of_tries(exc)))


def _of_tries(exc: BaseException) -> str:
    """What the first address of the host has answered; if none has, how the first try ended."""
    lines = str(exc).strip().split("\n")
    return next((line for line in lines if _SAID.search(line)), lines[0])


def reason(exc: psycopg2.Error) -> str:
    """What the database said, in one line, with what can be done about it if we know."""
    text = one_line(exc)
    return "; ".join([text, *(remedy for words, remedy in _REMEDIES.items() if words in text)])


def one_line(exc: BaseException) -> str:
    """The first line of what the database said."""
    diag = getattr(exc, "diag", None)
    text = (diag.message_primary if diag else None) or _of_tries(exc) or type(exc).__name__
    return " ".join(text.split("\n")[0].split())
