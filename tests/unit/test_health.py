"""Health: outcomes that overtake each other, and work under way."""

from __future__ import annotations

import asyncio
import time

import pytest

from datapipe import health
from datapipe.health import Health, Wait


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    return clock


def test_an_outcome_that_was_overtaken_says_nothing(clock: Clock) -> None:
    part = Health("database")
    assert (part.up, part.works(1000.0)) == (None, True)
    clock.now += 5
    assert part.fails(1004.0, "gone")
    assert not part.works(1004.5)  # it began before the failure
    assert (part.up, part.error, part.since) == (False, "gone", 1005.0)
    clock.now += 5
    assert not part.fails(1006.0, "still gone")
    assert (part.error, part.since) == ("still gone", 1005.0)
    clock.now += 5
    assert part.works(1011.0)
    assert not part.fails(1012.0, "late")
    assert (part.up, part.error, part.since) == (True, None, 1015.0)


def test_forgiven_means_not_known(clock: Clock) -> None:
    part = Health("load", "install")
    part.fails(1000.0, "the database is away")
    part.forgive()
    assert (part.up, part.error) == (None, None)


def test_work_under_way_is_slow_by_its_oldest(clock: Clock) -> None:
    part = Health("append")
    with part.doing("the first"):
        clock.now += 6
        with part.doing("the second"):
            clock.now += 6
            part.waits_for = Wait("the disk")
            shown = part.state()
        assert (shown["doing"], shown["doing_since"]) == ("the first", 1000.0)
        assert (shown["slow"], shown["waits_for"]) == (True, "the disk")
        assert part.waits_for == Wait("the disk")
        assert (shown["meaning"], shown["remedy"]) == ("", "")
    assert not part.slow
    assert part.state()["waits_for"] is None
    assert part.up is None


def test_what_leaves_the_block_is_the_outcome() -> None:
    part = Health("heartbeat")
    with part.trying("a heartbeat"):
        assert part.busy
    assert part.up is True
    with pytest.raises(RuntimeError), part.trying("a heartbeat"):
        raise RuntimeError("no")
    assert (part.up, part.error, part.busy) == (False, "no", False)
    with pytest.raises(asyncio.CancelledError), part.trying("a heartbeat"):
        raise asyncio.CancelledError
    assert (part.up, part.busy) == (False, False)
    assert part.since <= time.time()


async def test_what_runs_by_itself_is_followed() -> None:
    part = Health("removal")
    works, breaks, ends = (asyncio.get_running_loop().create_future() for _ in range(3))
    for each in (works, breaks, ends):
        part.follow("a removal", each)
    works.set_result(None)
    await asyncio.sleep(0)
    assert (part.up, part.busy) == (True, True)
    breaks.set_exception(RuntimeError("no"))
    await asyncio.sleep(0)
    assert (part.up, part.error) == (False, "RuntimeError('no')")
    ends.cancel()
    await asyncio.sleep(0)
    assert (part.up, part.busy) == (False, False)
