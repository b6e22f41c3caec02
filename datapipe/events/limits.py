"""What a database can't hold of an event: refused at ingest, or at the start; its sink says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

_MAX_OFFSET_S = 57_600  # rows hold less


@dataclass(slots=True, frozen=True)
class Limits:
    """The bounds of one kind of database; the defaults are those of the embedded one.

    Attributes:
        whole_digits, decimal_digits: of a Decimal, before and after the point.
        beyond_years: whether a time is held that in UTC is before the year 1 or past 9999; in rows
            it keeps its offset.
        json_depth: how deep a dict or a list may be nested; None: any that can be decoded.
        reserved: what no column may be called, in lower case.
        reserved_tables: what no name of a table may begin with.
        name_bytes: of a column.
        last_character: of the characters in a column's name.
        ignores_case: whether names that differ in case alone are one.
    """

    whole_digits: int = 131_072
    decimal_digits: int = 16_383
    beyond_years: bool = True
    json_depth: int | None = None
    reserved: frozenset[str] = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
    reserved_tables: tuple[str, ...] = ()
    name_bytes: int = 63
    last_character: str = chr(0x10FFFF)
    ignores_case: bool = False

    @property
    def texts(self) -> dict[type, Callable[[Any], str]]:
        """How values stand in rows, by type, where `str` is not enough.

        They raise OverflowError: the value is out of range.
        """
        return {datetime: self._time, Decimal: self._decimal}

    def _time(self, value: datetime) -> str:
        """In UTC; one without a zone is taken to be UTC."""
        if value.tzinfo is None:
            return str(value)
        try:
            return str(value.astimezone(UTC))[:-6]
        except OverflowError:
            offset = value.utcoffset()
            if not self.beyond_years or offset is None:
                raise
            if abs(offset.total_seconds()) >= _MAX_OFFSET_S:
                raise
            return str(value)

    def _decimal(self, value: Decimal) -> str:
        exponent = value.as_tuple().exponent
        if not isinstance(exponent, int):  # NaN, Infinity
            raise OverflowError
        if value.adjusted() >= self.whole_digits or exponent < -self.decimal_digits:
            raise OverflowError
        return str(value)

    def is_too_deep(self, value: Any, sent: bytes) -> bool:
        """Whether decoded JSON is nested too deep. Args: sent: the same as text."""
        most = self.json_depth
        if most is None or sent.count(b"[") + sent.count(b"{") <= most:
            return False
        level = [value]
        for _ in range(most):
            level = [inner for each in level for inner in _within(each)]
        return any(isinstance(each, dict | list) for each in level)

    def column_fault(self, name: str, others: set[str]) -> str | None:
        """Why no column can have this name. Args: others: those there are, as `folded` has them."""
        if self.folded(name) in self.reserved:
            return "this name is reserved: it can't be a column"
        if len(name.encode()) > self.name_bytes:
            return f"this name is longer than {self.name_bytes} bytes: it can't be a column"
        if name and max(name) > self.last_character:
            return f"{max(name)!r} can't be in the name of a column"
        if self.folded(name) in others:
            return "this name differs from another in case alone: they can't both be columns"
        return None

    def folded(self, name: str) -> str:
        """What is the same for names that are one to the database."""
        return "".join(char.lower()[0] for char in name) if self.ignores_case else name


def _within(value: Any) -> list[Any]:
    """What a dict or a list holds."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
