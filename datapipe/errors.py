"""All errors that datapipe raises on purpose. The class says what happens next."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class DatapipeError(Exception):
    """The root: catch this to catch what datapipe itself raises."""


class ConfigError(DatapipeError):
    """A setting, an option or an event type is wrong: no start; the message names the remedy."""


class Reason(Enum):
    """Why a request or an event is refused.

    Attributes:
        label: the `reason` in `datapipe_events_rejected_total`.
        code: the `status_code` of the answer.
        status: its HTTP status, unless the error says otherwise.
    """

    NO_CONTENT = "no_content", 2, 400
    BAD_JSON = "bad_json", 3, 400
    KEY_MISSING = "key_missing", 4, 400
    BAD_VALUE = "bad_value", 5, 400
    TOO_LONG = "too_long", 6, 400
    UNSUPPORTED_EVENT = "unsupported_event", 7, 400
    UNAUTHORIZED = "unauthorized", 8, 401
    FORBIDDEN = "forbidden", 8, 403
    UNSUPPORTED_ENCODING = "unsupported_encoding", 3, 415
    KEY_REUSED = "key_reused", 10, 422
    RATE_LIMITED = "rate_limited", 11, 429
    BUSY = "busy", 9, 503
    TIMEOUT = "timeout", 3, 408

    def __init__(self, label: str, code: int, status: int) -> None:
        self.label = label
        self.code = code
        self.status = status


class Refused(DatapipeError):
    """A request or an event is not accepted: `reason` is for programs, `detail` for people.

    Attributes:
        status: HTTP status of the answer.
        body: what was refused, if it had been read.
    """

    body: bytes = b""

    def __init__(self, reason: Reason, detail: str, status: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.status = status or reason.status


class EventRejected(Refused):
    """An event, a whole body or an admin's request is wrong: it fails again unless changed."""


class Busy(Refused):
    """Nothing can be accepted now: 503, code 9 and Retry-After; nothing was promised.

    Attributes: lanes: that have no room, if it is because of these.
    """

    def __init__(self, detail: str, retry_after_s: float = 5.0, lanes: Sequence[str] = ()) -> None:
        super().__init__(Reason.BUSY, detail)
        self.retry_after_s = retry_after_s
        self.lanes = lanes


class RateLimited(Refused):
    """This ingest key posts more than its rate: 429, code 11 and Retry-After."""

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(Reason.RATE_LIMITED, detail)
        self.retry_after_s = retry_after_s


class BufferFull(Busy):
    """Memory, the mirror or the lane has no room left."""


class MirrorUnavailable(Busy):
    """The mirror did not answer in time, or reported an error."""


class MirrorFull(MirrorUnavailable, BufferFull):
    """The mirror works and has no room: healthy, and nothing to repair there."""


class SinkUnavailable(DatapipeError):
    """The load did not happen, or its outcome is unknown: the same segments again, later.

    `everywhere`: the whole database is affected; false for a lock, a deadlock and the like, which
    affect one lane.
    """

    def __init__(self, detail: str, *, everywhere: bool = True) -> None:
        super().__init__(detail)
        self.everywhere = everywhere


class LaneBlocked(DatapipeError):
    """This table can't take its events until a person acts; the rows stay where they are."""
