"""Whose a message in a shared queue is, and so what is to be done with it: for all remote mirrors.

What is reserved there can't be filtered by its sender, and an answer may be lost after its effect.
So a message names its segment and its sender, and this is how nothing is lost and nothing doubled:

- A post is repeated with the same segment id, so a copy that was stored without an answer is the
  same segment to the ledger, which skips it.
- While its sender lives, a message is the sender's: it is loaded from the sender's memory, and
  deleted by id after the commit. Others reserve it only on the way to another, and release it.
- A sender that is dead (its heartbeat in the database stands still) leaves its messages to whoever
  sees them first. If it lives after all, both load, and the ledger lets one of them through; to the
  other they are duplicates, so its books still balance.
- A message of ours that is not in our books is recovered the same way: its append was given up on,
  yet stored; or it is a second copy; or somebody had it reserved when we deleted it.
- What can't be loaded here waits, and must not expire meanwhile.
- A message whose form is not ours is quarantined, never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple, Protocol

from datapipe.errors import LaneBlocked, SinkUnavailable
from datapipe.mirrors import Membership


class Label(NamedTuple):
    """What a message says of itself.

    Attributes:
        message: its id in the queue.
        sender: the process that posted it.
        old: it is close to its expiration.
    """

    message: str
    lane: str
    segment: str
    sender: str
    old: bool


class Fate(Enum):
    """What is to be done with a message; one that is to stay is released if it was reserved."""

    OURS = auto()  # it is in our books, or will be: it stays
    THEIRS = auto()  # its sender may live: it stays
    WAITS = auto()  # nobody here can load it: it stays
    RECOVER = auto()  # it is nobody's: to be loaded here
    DELETE = auto()  # a copy of what is in our books, or loaded already
    RENEW = auto()  # it waits and would expire: to be posted anew, unless the ledger knows it
    QUARANTINE = auto()  # it can't be read


STAYS = frozenset({Fate.OURS, Fate.THEIRS, Fate.WAITS})


class Books(Protocol):
    """What this process knows about its own messages.

    Attributes:
        appending: segments whose post is under way.
    """

    process: str
    appending: set[str]

    def message_of(self, segment: str) -> str | None:
        """The id of the message that bears this segment of ours."""

    def is_removed(self, segment: str) -> bool:
        """Whether we loaded this segment, and its message could not be deleted then."""


def fate_of(label: Label | None, lane: str, books: Books, membership: Membership) -> Fate:
    """What is to be done with a message that was seen in the queue of a lane.

    Args: label: None: the message can't be read.
    """
    can_load = membership.can_load(lane)
    if label is None or label.lane != lane:  # perhaps it is somebody else's queue
        return Fate.QUARANTINE if can_load else Fate.WAITS
    if label.segment in books.appending:
        return Fate.OURS
    if (known := books.message_of(label.segment)) is not None:
        return Fate.OURS if known == label.message else Fate.DELETE
    if books.is_removed(label.segment):
        return Fate.DELETE
    if not can_load and not label.old:
        return Fate.WAITS
    if label.sender != books.process and not membership.is_dead(label.sender):
        return Fate.THEIRS
    return Fate.RECOVER if can_load else Fate.RENEW


async def known_to_ledger(membership: Membership, segments: Sequence[str]) -> set[str]:
    """Which of them are loaded, as far as the database says: without it, none."""
    if not segments:
        return set()
    try:
        return await membership.loaded(segments)
    except (SinkUnavailable, LaneBlocked):
        return set()  # better twice in the queue, for the ledger to skip, than expired
