"""The lane of events whose type is not registered here: kept as they were sent, to be replayed."""

from __future__ import annotations

import msgspec

from datapipe.errors import EventRejected, Reason
from datapipe.events.limits import Limits
from datapipe.events.rows import DEFAULTS, NO_NUL, NUL_IN_JSON, escape, too_long
from datapipe.events.types import Column, EventType, is_event_name

UNKNOWN = "datapipe_unknown"


class UnknownRow(msgspec.Struct):
    """A row of this lane as JSON, such as a dead letter of it."""

    event_name: str
    event: msgspec.Raw
    received_at: str = ""


class _Named(msgspec.Struct):
    event_name: str


class UnknownType:
    """Writes the rows of the lane `datapipe_unknown`; see `EventType`."""

    name = UNKNOWN
    struct = UnknownRow
    columns = (
        Column("event_name", "text"),
        Column("event", "json"),
        Column("received_at", "timestamptz"),
    )
    partition: str | None = None

    def __init__(
        self,
        input_max_len: int = 16_384,
        limits: Limits = DEFAULTS,
        retention_s: int | None = None,
    ) -> None:
        self.max_len = input_max_len
        self.limits = limits
        self.retention_s = retention_s

    def takes(self, event_name: str) -> bool:
        """Whether there could be a type of this name."""
        return is_event_name(event_name, self.limits)

    def look_closer(self, raw: bytes, received_at: str) -> bytes:
        """The row of one JSON object, whose name `takes` is true of.

        Raises: EventRejected: it can't be kept.
        """
        if len(raw) > self.max_len:
            raise too_long(self.max_len)
        try:
            event_name = msgspec.json.decode(raw, type=_Named).event_name
        except msgspec.DecodeError as exc:  # it has a name, so that alone can be wrong
            raise _unstorable(f"half of a surrogate pair can't be stored ({exc})") from None
        text = raw.decode()
        if NUL_IN_JSON.search(text):
            raise _unstorable(NO_NUL)
        return f"{event_name}\t{escape(text)}\t{received_at}\n".encode()

    def replayed(self, letter: bytes, received_at: str) -> bytes:
        """The row of a dead letter of this lane. Raises: as `look_closer`."""
        event = msgspec.json.decode(letter, type=UnknownRow).event
        return self.look_closer(bytes(event), received_at)


def _unstorable(why: str) -> EventRejected:
    return EventRejected(Reason.BAD_VALUE, f"an event of an unknown type: {why}")


Kind = EventType | UnknownType
