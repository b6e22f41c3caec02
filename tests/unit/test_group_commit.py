"""Group commit: chunks of many POSTs become segments that are full, whole and complete, at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Chunk, Segment, seal
from datapipe.events.types import Column
from datapipe.health import Health
from datapipe.mirrors import Appended, Traits
from datapipe.pipeline import group_commit as group_commit_module
from datapipe.pipeline.group_commit import GroupCommit

COLUMNS = (Column("a", "text"),)


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    made = []
    for number in range(draw(st.integers(1, 12))):
        rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
        data = b"".join(b"x" * (size - 1) + b"\n" for size in rows)
        claim = ("c", "b", number) if draw(st.booleans()) else None
        made.append(Chunk(draw(st.sampled_from("pq")), COLUMNS, data, len(rows), claim))
    return made


@given(chunks(), st.integers(1, 200))
def test_segments_hold_all_rows_within_bounds(given_chunks: list[Chunk], max_bytes: int) -> None:
    segments = seal(given_chunks, max_bytes)
    for lane in "pq":
        wanted = b"".join(chunk.data for chunk in given_chunks if chunk.lane == lane)
        assert b"".join(s.data for s in segments if s.lane == lane) == wanted
    for segment in segments:
        assert segment.events == segment.data.count(b"\n") > 0
        whole = [segment.data[part.start : part.end] for part in segment.parts]
        single = segment.events == 1 or whole == [segment.data]
        assert len(segment.data) <= max_bytes or single
    parts = [(s.lane, p.number, s.data[p.start : p.end]) for s in segments for p in s.parts]
    keyed = [(c.lane, c.claim[2], c.data) for c in given_chunks if c.claim]
    assert sorted(parts) == sorted(keyed)


def test_rows_are_cut_so_that_segments_are_full() -> None:
    posts = [Chunk("p", COLUMNS, b"123456789\n" * 60, 60) for _ in range(10)]
    assert [len(segment.data) for segment in seal(posts, 1000)] == [1000] * 6


CHUNK = Chunk("p", COLUMNS, b"1\n", 1)


class Appends:
    """A mirror that says what was appended; `fails` is raised, `hangs` is waited for."""

    def __init__(self) -> None:
        self.traits = Traits(batch_bytes=1000, identity="", recover_interval_s=1.0)
        self.fails: Exception | None = None
        self.hangs = asyncio.Event()
        self.hangs.set()

    def state(self) -> Any:
        return SimpleNamespace(kind="journal")

    async def append(self, segments: Sequence[Segment]) -> Appended:
        if self.fails is not None:
            raise self.fails
        await self.hangs.wait()
        return Appended(segments)


class Group:
    """A group commit over such a mirror, its books, and what died of it."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.mirror: Any = Appends()
        self.booked: list[Appended] = []
        self.died: list[BaseException] = []
        self._commit = GroupCommit(
            self.mirror, lambda appended, began: self.booked.append(appended), Health(),
            self.died.append, linger_s=0.0, timeout_s=timeout_s,
        )  # fmt: skip

    def add(self) -> asyncio.Future[None]:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: Exception | None) -> None:  # InvalidStateError if it is called twice
            durable.set_exception(error) if error else durable.set_result(None)

        self._commit.add([CHUNK], done)
        return durable


@pytest.mark.parametrize("turns", range(16))
async def test_a_request_is_appended_whenever_it_comes(turns: int) -> None:
    """Also in the very turn of the loop in which the task before has ended."""
    group = Group()
    for _ in range(50):
        await group.add()
        for _ in range(turns):
            await asyncio.sleep(0)
    assert [len(appended.stored) for appended in group.booked] == [1] * 50


async def test_an_append_that_fails_unforeseen_answers_each_request() -> None:
    group = Group()
    group.mirror.fails = RuntimeError("not foreseen")
    for _ in range(2):  # and it goes on
        with pytest.raises(RuntimeError, match="not foreseen"):
            await group.add()
    assert not group.died


async def test_a_task_that_dies_is_reported_and_leaves_no_request_in_the_air() -> None:
    group = Group()
    group.mirror.traits = SimpleNamespace(appends_at_once=1)
    for _ in range(2):
        with pytest.raises(AttributeError):
            await group.add()
        await asyncio.sleep(0)
    assert [type(died) for died in group.died] == [AttributeError] * 2


async def test_what_hangs_refuses_all_until_it_ends() -> None:
    group = Group(timeout_s=0.01)
    group.mirror.hangs.clear()
    first, second = group.add(), group.add()
    for refused in (first, second):
        with pytest.raises(MirrorUnavailable):
            await refused
    assert isinstance(group.add().exception(), MirrorUnavailable)  # without waiting
    assert [len(appended.stored) for appended in group.booked] == [0]
    group.mirror.hangs.set()
    while len(group.booked) == 1:
        await asyncio.sleep(0)
    assert len(group.booked[1].stored) == 1  # stored after all: it is booked, and will be loaded
    await group.add()
    assert len(group.booked[2].stored) == 1


async def test_a_task_that_starts_as_all_is_refused_holds_up_nothing_after_it() -> None:
    """An append that hangs is given up between a request and the start of its task."""
    group = Group(timeout_s=0.2)
    group.mirror.traits = Traits(4, "", 1.0, appends_at_once=2)
    group.mirror.hangs.clear()
    first = group.add()
    await asyncio.sleep(0.05)
    late: list[asyncio.Future[None]] = []
    asyncio.get_running_loop().call_later(0.1, lambda: late.append(group.add()))
    time.sleep(0.5)  # both timers are due in one turn of the loop
    with pytest.raises(MirrorUnavailable):
        await first
    with pytest.raises(MirrorUnavailable):
        await late[0]
    group.mirror.hangs.set()
    while len(group.booked) < 2:
        await asyncio.sleep(0)
    await group.add()


async def test_a_task_whose_requests_another_has_taken_appends_nothing() -> None:
    """The mirror would answer an empty append, and be called up by it though it is down."""
    group = Group()
    group.mirror.traits = Traits(1000, "", 1.0, appends_at_once=2, linger_s=0.001)
    await asyncio.gather(group.add(), group.add())
    await asyncio.sleep(0.01)
    assert [len(appended.stored) for appended in group.booked] == [1]


async def test_appends_become_fewer_at_once_when_the_mirror_wants_that() -> None:
    """Also while requests come without a break, so that each task finds something to append."""
    group = Group()
    under_way: list[int] = []

    async def append(segments: Sequence[Segment]) -> Appended:
        under_way.append(len(under_way) - len(group.booked))
        await asyncio.sleep(0.01)
        return Appended(segments)

    group.mirror.append = append
    for at_once in (4, 1):
        group.mirror.traits = Traits(1000, "", 1.0, appends_at_once=at_once, linger_s=0.002)
        for _ in range(150):
            group.add()
            await asyncio.sleep(0.001)
    assert max(under_way) > 1
    assert set(under_way[-5:]) == {0}


async def test_one_whose_answer_fails_leaves_no_other_without_one() -> None:
    group = Group()

    def fails(error: Exception | None) -> None:
        raise RuntimeError("no answer could be made")

    group._commit.add([CHUNK], fails)
    await group.add()
    assert not group.died


class Steps:
    """A mirror that takes several appends at once, each of which ends when it is told to."""

    def __init__(self, group: Group) -> None:
        self.sizes: list[int] = []
        self._ends: list[asyncio.Event] = []
        group.mirror.traits = Traits(1 << 20, "", 1.0, appends_at_once=8)
        group.mirror.append = self._append

    async def _append(self, segments: Sequence[Segment]) -> Appended:
        self.sizes.append(sum(segment.events for segment in segments))
        self._ends.append(asyncio.Event())
        await self._ends[-1].wait()
        return Appended(segments)

    async def end(self, number: int) -> None:
        self._ends[number].set()
        await _turns()


async def _turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_while_an_append_is_under_way_the_next_gathers_one_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each stray request would be an append of its own, which costs as much as a large one."""
    monkeypatch.setattr(group_commit_module, "_PATIENCE_S", 10.0)
    group = Group()
    steps = Steps(group)
    for _ in range(64):
        group.add()
    await _turns()
    for _ in range(63):
        group.add()
        await _turns()
    assert steps.sizes == [64]
    group.add()
    await _turns()
    assert steps.sizes == [64, 64]
    for number in range(2):
        await steps.end(number)


async def test_what_is_gathered_goes_out_when_the_append_before_has_ended() -> None:
    group = Group()
    steps = Steps(group)
    group.add()
    await _turns()
    late = [group.add(), group.add()]
    await _turns()
    assert steps.sizes == [1]  # the first did not wait for company
    await steps.end(0)
    assert steps.sizes == [1, 2]
    await steps.end(1)
    assert all(each.done() for each in late)


async def test_many_rows_wait_for_no_other_append() -> None:
    group = Group()
    steps = Steps(group)
    done: list[Exception | None] = []
    for _ in range(3):
        group._commit.add([Chunk("p", COLUMNS, b"1\n" * 50_000, 50_000)], done.append)
        await _turns()
    assert steps.sizes == [50_000] * 3
    for number in range(3):
        await steps.end(number)
    assert done == [None] * 3


async def test_an_append_that_hangs_holds_up_each_request_after_it_for_a_moment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    now = loop.time()  # stands still, unless we say so
    monkeypatch.setattr(loop, "time", lambda: now)
    group = Group()
    steps = Steps(group)
    group.add()
    await _turns()
    for number in range(1, 4):
        alone = group.add()
        await _turns()
        assert len(steps.sizes) == number  # it waits for company
        now += group_commit_module._PATIENCE_S
        await _turns()
        await steps.end(number)
        assert alone.done()
    assert steps.sizes == [1] * 4
    await steps.end(0)
