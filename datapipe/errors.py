"""All errors that datapipe raises on purpose. The class says what happens next."""

from __future__ import annotations


class DatapipeError(Exception):
    """The root: catch this to catch what datapipe itself raises."""


class ConfigError(DatapipeError):
    """A setting, an option or an event type is wrong: no start; the message names the remedy."""


class EventRejected(DatapipeError):
    """An event, or a whole body, is refused at the door.

    `code` is for programs, `detail` for people; `reason` is the label of
    `datapipe_events_rejected_total`; `body` is what was refused, where it was read.
    """

    body: bytes = b""

    def __init__(self, code: int, reason: str, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.code = code
        self.reason = reason
        self.detail = detail
        self.status = status


class Busy(DatapipeError):
    """Nothing can be taken now: 503, code 9 and Retry-After; nothing was promised."""

    def __init__(self, detail: str, retry_after_s: float = 5.0) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class BufferFull(Busy):
    """Memory, the mirror or the lane has no room left."""


class MirrorUnavailable(Busy):
    """The mirror did not do it in time, or says that it can't."""


class MirrorFull(MirrorUnavailable, BufferFull):
    """The mirror works and has no room: healthy, and nothing to repair there."""


class SinkUnavailable(DatapipeError):
    """The load did not happen, or its outcome is unknown: the same segments again, later.

    `everywhere` tells the whole database from one lane: false for a lock, a deadlock and the like.
    """

    def __init__(self, detail: str, *, everywhere: bool = True) -> None:
        super().__init__(detail)
        self.everywhere = everywhere


class LaneBlocked(DatapipeError):
    """This table can't take its events until a person acts; the rows stay where they are."""
