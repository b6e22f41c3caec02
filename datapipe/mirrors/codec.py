"""What a stored segment consists of: id, lane, events, when it was sealed; its head; its rows.

Where these lie differs: in columns of a table, in keys of a message.
"""

from __future__ import annotations

from datapipe.events.segment import Head, Segment
from datapipe.events.types import Column


def restored(
    head: Head, data: bytes, *, id: str, lane: str, events: int, created_at: float
) -> Segment:
    """The segment that was stored as these; its place is the mirror's to set."""
    columns = [Column(*column[:2]) for column in head.columns]
    return Segment(lane, columns, data, events, head.parts, id=id, created_at=created_at)
