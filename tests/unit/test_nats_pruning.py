"""When the ledger may forget what a shared mirror held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from datapipe.mirrors.nats.prune import FENCE_S, SPREAD_S, Pruning

MINUTE = 60.0


def test_a_note_serves_once_the_stream_has_passed_it_and_a_while_is_over() -> None:
    pruning = Pruning()
    assert pruning.look("a", 0.0, 1, 10) is None  # noted
    assert pruning.look("a", 9000.0, 10, 12) is None  # the last one of them is still there
    assert pruning.look("a", 9060.0, 11, 12) is None  # now it is passed
    assert pruning.look("a", 9060.0 + SPREAD_S - 1, 13, 12) is None
    assert pruning.look("a", 9060.0 + SPREAD_S, 13, 12) == -SPREAD_S
    assert pruning.look("a", 9120.0 + SPREAD_S, 13, 12) is None  # the next note, passed at once
    assert pruning.look("a", 9120.0 + 2 * SPREAD_S, 13, 12) == 9060.0


def test_an_empty_stream_is_passed() -> None:
    """JetStream says that the first to come is the next one."""
    pruning = Pruning()
    for now in (0.0, MINUTE):
        assert pruning.look("a", now, 11, 10) is None
    assert pruning.look("a", MINUTE + SPREAD_S, 11, 10) == -SPREAD_S


def test_lanes_are_apart() -> None:
    pruning = Pruning()
    pruning.look("a", 0.0, 11, 10)
    pruning.look("a", MINUTE, 11, 10)
    assert pruning.look("b", MINUTE + SPREAD_S, 11, 10) is None
    assert pruning.look("a", MINUTE + SPREAD_S, 11, 10) is not None


def test_a_stream_that_was_made_anew_is_noted_anew() -> None:
    pruning = Pruning()
    pruning.look("a", 0.0, 1, 1000)
    assert pruning.look("a", MINUTE, 1, 5) is None
    assert pruning.look("a", 2 * MINUTE, 6, 5) is None
    assert pruning.look("a", 2 * MINUTE + SPREAD_S, 6, 5) == MINUTE - SPREAD_S


@given(
    loaded=st.floats(0, 5000), copied_s=st.floats(0, SPREAD_S - 1), first=st.floats(0, 5000),
    every_s=st.floats(1, 120),
)  # fmt: skip
def test_no_row_goes_while_a_copy_of_its_segment_waits(
    loaded: float, copied_s: float, first: float, every_s: float
) -> None:
    """A segment is loaded, a copy of it comes later, and leaves the stream at some time.

    Its row must be there as long as the copy is, and for as long as whoever took it may sleep.
    """
    copied, gone = loaded + copied_s, loaded + copied_s + first
    pruning, now = Pruning(), 0.0
    while now < gone + FENCE_S:
        last_seq = 2 if now >= copied else 1
        first_seq = 3 if now >= gone else last_seq if now >= loaded else 1
        if loaded <= now < copied:
            first_seq = 2
        before = pruning.look("a", now, first_seq, last_seq)
        assert before is None or before <= loaded
        now += every_s
