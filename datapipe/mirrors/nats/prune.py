"""Pruning: which ledger rows of a lane may go, because no copy of their segments can come back.

A copy of a segment is a message that was stored twice (its append was repeated, and the duplicate
window was over), or one that a process took and sleeps on. So once a minute the time of the
database and the stream's last sequence are noted; when the stream has passed that sequence, all
copies that were stored until then are removed. A segment that was loaded `SPREAD_S` before the
note has no copy that was stored after it, for an append is repeated for less than that. Whoever
sleeps on one finds its load refused after `FENCE_S`; so after `SPREAD_S` more the rows can go.
Age alone shows nothing: all may have been stopped between COMMIT and acknowledgement.
"""

from __future__ import annotations

from dataclasses import dataclass

SPREAD_S = 900.0
FENCE_S = 300.0  # from the database's time before a segment is taken until it must be in the ledger
EVERY_S = 60.0


@dataclass(slots=True)
class Note:
    """What was noted of a stream; times are Unix times by the database's clock.

    Attributes: passed_at: when the stream was seen to have passed `last_seq`.
    """

    at: float
    last_seq: int
    passed_at: float | None = None


class Pruning:
    """One note for each lane at a time: the next is taken once it has served."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def look(self, lane: str, now: float, first_seq: int, last_seq: int) -> float | None:
        """Look at a stream: rows of segments loaded before the result may go; None: none may.

        Args: now: Unix time by the database's clock, read before the stream's state was.
        """
        note = self._notes.get(lane)
        if note is None or last_seq < note.last_seq:  # the stream was made anew
            self._notes[lane] = Note(now, last_seq)
            return None
        if note.passed_at is None:
            if first_seq > note.last_seq:
                note.passed_at = now
        elif now - note.passed_at >= SPREAD_S:
            self._notes[lane] = Note(now, last_seq)
            return note.at - SPREAD_S
        return None
