"""Verdict: what an error of a database means; each sink has one table of its own codes for it."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """What an error of the database means for the load in hand."""

    DOWN = "the whole database: again later"
    LATER = "this lane: again later"
    MISSING = "a table or column is missing: one DDL pass, then again"
    BLOCKED = "this lane is blocked until a person acts"
    ROW = "one row is refused"
