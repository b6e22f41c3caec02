"""Whose a message in a shared queue is, case by case."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from datapipe.mirrors.recovery import STAYS, Fate, Label, fate_of


class Known:
    """Books of the process `me`."""

    process = "me"
    appending = {"being posted"}

    def message_of(self, segment: str) -> str | None:
        return {"ours": "m1"}.get(segment)

    def is_removed(self, segment: str) -> bool:
        return segment == "loaded"


class Members:
    """`dead` is, and the lane `purchase` can't be loaded."""

    def is_dead(self, process: str) -> bool:
        return process == "dead"

    def can_load(self, lane: str) -> bool:
        return lane == "install"

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        raise AssertionError

    async def expire_source(self, source: str) -> None:
        raise AssertionError


# sender, segment, message, close to its expiration; in a lane that can be loaded, in one that can't
CASES = [
    ("dead", "unheard of", "m9", False, Fate.RECOVER, Fate.WAITS),
    ("dead", "unheard of", "m9", True, Fate.RECOVER, Fate.RENEW),
    ("alive", "unheard of", "m9", False, Fate.THEIRS, Fate.WAITS),
    ("alive", "unheard of", "m9", True, Fate.THEIRS, Fate.THEIRS),
    ("me", "given up on", "m9", False, Fate.RECOVER, Fate.WAITS),
    ("me", "given up on", "m9", True, Fate.RECOVER, Fate.RENEW),
    ("me", "being posted", "m9", True, Fate.OURS, Fate.OURS),
    ("me", "ours", "m1", True, Fate.OURS, Fate.OURS),
    ("me", "ours", "m9", False, Fate.DELETE, Fate.DELETE),
    ("dead", "ours", "m1", True, Fate.OURS, Fate.OURS),  # recovered before
    ("dead", "ours", "m9", False, Fate.DELETE, Fate.DELETE),
    ("dead", "loaded", "m9", False, Fate.DELETE, Fate.DELETE),
    ("alive", "loaded", "m9", False, Fate.DELETE, Fate.DELETE),
]


@pytest.mark.parametrize(("sender", "segment", "message", "old", "loadable", "not_loadable"), CASES)
def test_what_is_done_with_a_message(
    sender: str, segment: str, message: str, old: bool, loadable: Fate, not_loadable: Fate
) -> None:
    for lane, wanted in (("install", loadable), ("purchase", not_loadable)):
        label = Label(message, lane, segment, sender, old)
        assert fate_of(label, lane, Known(), Members()) is wanted


def test_what_can_not_be_read_is_quarantined_where_the_queue_is_ours() -> None:
    astray = Label("m9", "purchase", "s", "dead", old=True)
    for label in (None, astray):
        assert fate_of(label, "install", Known(), Members()) is Fate.QUARANTINE
    assert fate_of(None, "purchase", Known(), Members()) in STAYS
