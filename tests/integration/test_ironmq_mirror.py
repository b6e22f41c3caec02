"""IronMQ as the mirror, against the stand-in: on a clock that only the test moves."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import string
import subprocess
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from datapipe.errors import MirrorFull, MirrorUnavailable, SinkUnavailable
from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column
from datapipe.mirrors import check_mirror
from datapipe.mirrors.ironmq import mirror as ironmq
from datapipe.mirrors.ironmq.books import ANEW_S, HELD_BYTES, LEASE_S, Books, Held
from datapipe.mirrors.ironmq.mirror import open_store
from datapipe.mirrors.ironmq.wire import pack
from datapipe.mirrors.store import Found, Removal, Run
from datapipe.settings import Settings
from tests.doubles.faults import What
from tests.doubles.ironmq import Clock, IronMQ

COLUMNS = (Column("user_id", "bigint"), Column("note", "text"))
DAY_S = 86_400.0


@dataclass
class Town:
    """Membership as a test wants it."""

    dead: set[str] = field(default_factory=set)
    ledger: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=lambda: {"install", "purchase"})
    database_up: bool = True

    def is_dead(self, process: str) -> bool:
        return process in self.dead

    def can_load(self, lane: str) -> bool:
        return lane in self.types

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        if not self.database_up:
            raise SinkUnavailable("away")
        return self.ledger & set(segments)

    async def expire_source(self, source: str) -> None:
        raise AssertionError("no source of IronMQ ends")


class World:
    """One IronMQ and the mirrors of several processes; all on one clock."""

    def __init__(self, mq: IronMQ, clock: Clock, stack: AsyncExitStack) -> None:
        self.mq = mq
        self.clock = clock
        self.town = Town()
        self._stack = stack

    def settings(self, **more: Any) -> Settings:
        return Settings(
            ironmq_host=self.mq.host, ironmq_project_id=self.mq.project_id,
            ironmq_token=self.mq.token, **{"mirror_timeout": 5.0, **more},
        )  # fmt: skip

    async def open(self, process: str = "me", **more: Any) -> ironmq.IronMQ:
        mirror = open_store(self.settings(**more), process, self.clock)
        return await self._stack.enter_async_context(mirror)

    async def left_by(self, process: str, segments: Sequence[Segment]) -> None:
        """Segments of a process that died after it stored them."""
        await store((await self.open(process)), segments)
        self.town.dead.add(process)

    async def recover(self, mirror: ironmq.IronMQ) -> Found:
        return await mirror.recover(self.town)

    def segments(self, queue: str = "install") -> list[str]:
        return [json.loads(body)["segment"] for body in self.mq.queue(queue).bodies]

    def visible(self, queue: str = "install") -> int:
        """Messages that nobody has reserved."""
        return sum(not each.reservation_id for each in self.mq.queue(queue).messages.values())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    clock = Clock()
    async with IronMQ(clock=clock) as mq, AsyncExitStack() as stack:
        yield World(mq, clock, stack)


async def store(mirror: ironmq.IronMQ, segments: Sequence[Segment]) -> list[Segment]:
    """Append, and raise why not all of it is stored."""
    appended = await mirror.append(segments)
    if appended.error is not None:
        raise appended.error
    return list(appended.stored)


async def remove(mirror: ironmq.IronMQ, segments: Sequence[Segment]) -> None:
    await mirror.remove([Removal.of(each) for each in segments])


def segment(number: int = 1, lane: str = "install", rows: int = 1) -> Segment:
    data = b"".join(b"%d\tnote %d\n" % (number, row) for row in range(rows))
    return Segment(lane, COLUMNS, data, rows)


def noise(rows: int, size: int = 100, seed: int = 1) -> bytes:
    """Rows of random text: base64 makes more of it than gzip takes away."""
    chance, letters = random.Random(seed), string.ascii_letters + string.digits + string.punctuation
    text = letters.replace("\\", "")
    return b"".join(
        b"7\t%b\n" % "".join(chance.choices(text, k=size)).encode() for _ in range(rows)
    )


def ids(segments: Iterable[Segment]) -> list[str]:
    return [each.id for each in segments]


# --- the wire form ---


async def test_a_message_can_be_read_by_hand(world: World) -> None:
    mirror = await world.open()
    stored = segment(42, rows=3)
    await store(mirror, [stored])
    (body,) = world.mq.queue("install").bodies
    message = json.loads(body)
    assert message | {"rows": ""} == {
        "datapipe": 1, "segment": stored.id, "lane": "install", "sender": "me",
        "posted": world.clock.now, "created": stored.created_at, "events": 3,
        "columns": [["user_id", "bigint"], ["note", "text"]], "parts": [], "rows": "",
    }  # fmt: skip
    rows = subprocess.run(
        "base64 -d | gunzip", shell=True, input=message["rows"].encode(), capture_output=True
    )
    assert rows.stdout == stored.data


async def test_the_queue_is_made_with_thirty_days_and_named_with_the_prefix(world: World) -> None:
    mirror = await world.open(ironmq_queue_prefix="my ")
    await store(mirror, [segment()])
    await store(mirror, [segment()])
    assert world.mq.queue("my install").settings["message_expiration"] == 30 * DAY_S
    assert world.mq.requests == {"put_queue": 1, "post": 2}


# --- 64 KB ---


@pytest.mark.parametrize("count_head", [False, True])
async def test_what_is_too_large_is_cut_and_stays_in_order(world: World, count_head: bool) -> None:
    world.mq.rules.count_head = count_head
    mirror = await world.open()
    data = noise(10_000)
    stored = await store(mirror, [Segment("install", COLUMNS, data, 10_000)])
    assert set(world.mq.statuses) == {200, 201}, "a request was too large"
    assert b"".join(each.data for each in stored) == data
    assert world.segments() == ids(stored)
    positions = [each.position for each in stored]
    assert positions == sorted(set(positions))
    fullness = [len(body) / 65_536 for body in world.mq.queue("install").bodies]
    assert sum(fullness) / len(fullness) > 0.8


async def test_no_request_is_larger_than_allowed_with_its_head(world: World) -> None:
    """Of segments that grow row by row, some just fit and some just don't."""
    world.mq.rules.count_head = True
    mirror = await world.open()
    for rows in range(500, 600, 2):
        await store(mirror, [Segment("install", COLUMNS, noise(rows, seed=rows), rows)])
    assert set(world.mq.statuses) == {200, 201}, "a request was too large"
    assert 50 < world.mq.requests["post"] < 100


async def test_keyed_parts_are_never_cut(world: World) -> None:
    """Each bears two hashes, so that they may need more room than their rows."""
    mirror = await world.open()
    row = b"1\tx\n"
    parts = tuple(
        Part(f"{n:032x}", f"{n + 7:032x}", 0, n * 4 * 3, (n + 1) * 4 * 3, 3) for n in range(3000)
    )
    stored = await store(mirror, [Segment("install", COLUMNS, row * 9000, 9000, parts)])
    assert set(world.mq.statuses) == {200, 201}
    assert sum(each.events for each in stored) == 9000
    for each in stored:
        assert sum(part.events for part in each.parts) == each.events
        assert each.parts[-1].end == len(each.data)
    found = [part for each in stored for part in each.parts]
    assert [part.claim for part in found] == [part.claim for part in parts]
    assert all(part.end - part.start == 12 and part.events == 3 for part in found)


async def test_an_event_too_large_for_a_message_is_refused_and_harms_nobody(world: World) -> None:
    mirror = await world.open()
    with pytest.raises(MirrorFull, match="too large"):
        await store(mirror, [Segment("install", COLUMNS, noise(1, 70_000), 1)])
    assert mirror.state().up
    assert not mirror.books.given_up


async def test_next_segments_fill_a_message(world: World) -> None:
    """What was packed before tells how many rows go into one."""
    mirror = await world.open(load_trigger_bytes=1 << 24)
    for number in range(30):
        size = mirror.traits.batch_bytes
        data = noise(1 + size // 105, seed=number)[:size].rpartition(b"\n")[0] + b"\n"
        await store(mirror, [Segment("install", COLUMNS, data, data.count(b"\n"))])
    sizes = [len(body) for body in world.mq.queue("install").bodies[-10:]]
    assert min(sizes) > 55_000


# --- answers that do not come ---

FAULTS: list[tuple[What, bool]] = [
    ("500", False), ("503", False), ("504", False), ("408", False), ("reset", False),
    ("reset", True), ("503", True), ("408", True), ("cut", True), ("slow", True), ("late", True),
]  # fmt: skip


@pytest.mark.parametrize(("what", "after"), FAULTS)
async def test_a_fault_that_passes_is_outlived(world: World, what: What, after: bool) -> None:
    mirror = await world.open()
    world.mq.faults.next(what, 2, call="post", after=after, seconds=0.1)
    stored = segment()
    assert await store(mirror, [stored]) == [stored]
    assert set(world.segments()) == {stored.id}, "another id on another try"
    assert mirror.state().up
    await remove(mirror, [stored])


@pytest.mark.parametrize(("what", "after"), FAULTS)
async def test_a_fault_that_stays_ends_in_time(world: World, what: What, after: bool) -> None:
    mirror = await world.open(mirror_timeout=0.4)
    world.mq.faults.rate(what, 1.0, call="post", after=after, seconds=3)
    stored = segment()
    started = asyncio.get_running_loop().time()
    with pytest.raises(MirrorUnavailable) as caught:
        await store(mirror, [stored])
    assert asyncio.get_running_loop().time() - started < 1.5
    assert "IronMQ" in caught.value.detail
    assert mirror.books.given_up
    assert not mirror.state().up
    assert set(world.segments()) <= {stored.id}
    world.mq.faults.clear()
    await store(mirror, [segment(2)])
    assert mirror.state().up


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_away_and_back(world: World, how: Any) -> None:
    mirror = await world.open(mirror_timeout=0.4)
    await store(mirror, [segment(1)])
    await world.mq.leave(how)
    with pytest.raises(MirrorUnavailable, match=r"can't be reached|does not answer"):
        await store(mirror, [segment(2)])
    await world.mq.come_back()
    await store(mirror, [segment(3)])


async def test_wrong_credentials_are_told_at_once(world: World) -> None:
    mirror = await world.open()
    world.mq.token = "another"
    with pytest.raises(MirrorUnavailable, match="ironmq_token"):
        await store(mirror, [segment()])
    assert world.mq.requests["put_queue"] == 1, "no use to repeat it"


async def test_an_odd_answer_is_no_answer(world: World) -> None:
    mirror = await world.open(mirror_timeout=0.3)
    mirror.client._base += "/.."  # lists of projects, or whatever lies there
    with pytest.raises(MirrorUnavailable):
        await store(mirror, [segment()])


async def test_what_was_stored_of_a_failed_append_is_named(world: World) -> None:
    mirror = await world.open()
    world.mq.rules.max_bytes = 2000
    small, large, other = (
        segment(1),
        Segment("install", COLUMNS, noise(40), 40),
        segment(2, "purchase"),
    )
    appended = await mirror.append([small, large, other])
    assert isinstance(appended.error, MirrorUnavailable)
    assert appended.stored == [small, other]
    assert all(each.position for each in (small, other))
    await remove(mirror, [small, other])
    assert world.mq.queue("install").size == world.mq.queue("purchase").size == 0


async def test_pieces_stored_before_a_failure_are_named(world: World) -> None:
    mirror = await world.open(mirror_timeout=0.3)
    data = noise(5000)

    async def cut_off() -> None:
        await world.mq.until(lambda: world.mq.queue("install").size >= 2)
        world.mq.faults.rate("503", 1.0, call="post")

    cutting = asyncio.create_task(cut_off())
    appended = await mirror.append([Segment("install", COLUMNS, data, 5000)])
    assert isinstance(appended.error, MirrorUnavailable)
    await cutting
    assert ids(appended.stored) == world.segments()
    assert data.startswith(b"".join(each.data for each in appended.stored))


# --- removal ---


async def test_what_was_lost_sight_of_and_is_not_loaded_is_never_deleted(world: World) -> None:
    mirror = await world.open()
    (stored,) = await store(mirror, [segment()])
    stored.missing = True  # as far as a read could tell; the ledger does not know it
    await remove(mirror, [stored])
    assert world.segments() == [stored.id]
    assert mirror.books.given_up  # so the next look is soon
    (again,) = (await world.recover(mirror)).segments
    assert (again.id, again.missing) == (stored.id, False)


async def test_what_is_posted_anew_while_it_is_read_is_not_lost_sight_of(world: World) -> None:
    mirror = await world.open()
    stored = await store(mirror, [segment()])
    get = mirror.client.get

    async def late(queue: str, id: str) -> Any:
        mirror.client.get = get  # type: ignore[method-assign]
        world.clock.now += ANEW_S + 1
        await mirror.keep(world.town)
        return await get(queue, id)

    mirror.client.get = late  # type: ignore[method-assign]
    run = Run("install", stored[0].source, 0, stored[0].position, 1, 1, 10, 0.0)
    (read,) = await mirror.read(run, 1000)
    assert (read.id, read.missing, read.data) == (stored[0].id, False, stored[0].data)


async def test_one_that_may_not_be_posted_anew_keeps_no_other_from_it(world: World) -> None:
    mirror = await world.open()
    large, small = segment(1, rows=400), segment(2)
    await store(mirror, [large, small])
    world.mq.rules.max_bytes = 900  # a smaller plan
    world.clock.now += ANEW_S + 1
    before = {each.id for each in world.mq.queue("install").messages.values()}
    await mirror.keep(world.town)
    after = {each.id for each in world.mq.queue("install").messages.values()}
    assert len(before & after) == 1
    assert sorted(world.segments()) == sorted([large.id, small.id])


async def test_removal_takes_a_hundred_at_a_time_and_never_an_empty_list(world: World) -> None:
    world.mq.rules.empty_ids = "clear"
    mirror = await world.open()
    stored = [segment(n) for n in range(250)]
    await store(mirror, stored)
    await world.left_by("other", [segment(999)])
    await remove(mirror, [])
    await mirror.client.delete("install", [])
    await remove(mirror, stored)
    await remove(mirror, stored)
    assert world.mq.queue("install").size == 1
    assert world.mq.requests["delete_many"] == 3
    assert world.mq.requests["clear"] == world.mq.requests["delete"] == 0


@pytest.mark.parametrize("partial", [False, True])
async def test_one_that_is_gone_does_not_keep_the_others(world: World, partial: bool) -> None:
    world.mq.rules.bulk_partial = partial
    mirror, other = await world.open(), await world.open("other")
    stored = [segment(n) for n in range(5)]
    await store(mirror, stored)
    await other.client.delete("install", [(next(iter(world.mq.queue("install").messages)), None)])
    await remove(mirror, stored)
    assert world.mq.queue("install").size == 0


@pytest.mark.parametrize("partial", [False, True])
async def test_one_that_somebody_reserved_is_removed_once_it_comes_back(
    world: World, partial: bool
) -> None:
    """Its load has committed: nothing is recovered."""
    world.mq.rules.bulk_partial = partial
    mirror, other = await world.open(), await world.open("other")
    stored = [segment(n) for n in range(5)]
    await store(mirror, stored)
    await other.client.reserve("install", 1, 60)
    await remove(mirror, stored)
    assert world.segments() == [stored[0].id]
    assert mirror.state().bytes == 0
    assert mirror.books.given_up
    found = await world.recover(mirror)
    assert (found.segments, found.left, mirror.state().left) == ([], True, 1)
    world.clock.pass_(61)
    found = await world.recover(mirror)
    assert (found.segments, found.left, mirror.state().left) == ([], False, 0)
    assert world.mq.queue("install").size == 0


async def test_a_lease_whose_prolonging_was_not_answered_does_not_keep_its_message(
    world: World,
) -> None:
    """It was prolonged under a reservation id that nobody knows."""
    mirror = await world.open(mirror_timeout=5.0)
    await world.left_by("dead", [segment()])
    found = (await world.recover(mirror)).segments
    world.clock.pass_(LEASE_S / 2 + 1)
    world.mq.faults.next("reset", call="touch", after=True)
    await mirror.keep(world.town)
    await remove(mirror, found)
    assert world.mq.queue("install").size == 1
    assert (await world.recover(mirror)).left
    world.clock.pass_(2 * LEASE_S + 1)
    assert (await world.recover(mirror)).segments == []
    assert world.mq.queue("install").size == 0


async def test_wrong_credentials_end_no_lease(world: World) -> None:
    mirror = await world.open()
    await world.left_by("dead", [segment()])
    found = (await world.recover(mirror)).segments
    world.clock.pass_(LEASE_S / 2 + 1)
    world.mq.token, token = "another", world.mq.token
    with pytest.raises(MirrorUnavailable, match="ironmq_token"):
        await mirror.keep(world.town)
    world.mq.token = token
    await remove(mirror, found)
    assert world.mq.queue("install").size == 0
    assert 403 not in world.mq.statuses


@pytest.mark.parametrize(("what", "after"), FAULTS)
async def test_removal_under_faults(world: World, what: What, after: bool) -> None:
    mirror = await world.open()
    stored = [segment(n) for n in range(3)]
    await store(mirror, stored)
    world.mq.faults.next(what, 2, after=after, seconds=0.1)
    await remove(mirror, stored)
    assert world.mq.queue("install").size == 0
    assert mirror.state().bytes == 0


# --- recovery ---


async def test_a_living_process_is_left_alone_and_a_dead_one_recovered(world: World) -> None:
    mirror, other = await world.open(), await world.open("other")
    stored = [segment(n) for n in range(3)]
    await store(other, stored)
    found = await world.recover(mirror)
    assert (found.segments, found.unconfirmed) == ([], {"other"})
    assert world.mq.requests["reserve"] == 0
    world.town.dead.add("other")
    found = await world.recover(mirror)
    assert ids(found.segments) == ids(stored)
    assert found.segments[0].data == stored[0].data
    assert found.segments[0].columns == COLUMNS
    assert (await world.recover(mirror)).segments == []  # told once
    await remove(mirror, found.segments)
    assert world.mq.queue("install").size == 0


async def test_suspects_stay_while_another_queue_is_looked_at(world: World) -> None:
    """Nobody but the message may name them, so who forgets them never asks whether they live."""
    mirror, unheard = await world.open(), await world.open("unheard")
    await unheard.append([segment()])
    await world.left_by("dead", [segment(n, "purchase") for n in range(150)])
    for _ in range(3):
        found = await world.recover(mirror)
        assert found.unconfirmed == {"unheard"}
        await remove(mirror, found.segments)
    assert world.mq.queue("purchase").size == 0


async def test_kept_events_of_unknown_types_are_recovered(world: World) -> None:
    world.town.types |= {"datapipe_unknown"}
    mirror = await world.open()
    left = [segment(1, "datapipe_unknown"), segment(2)]
    await world.left_by("dead", left)
    found = await world.recover(mirror)
    assert sorted(ids(found.segments)) == sorted(ids(left))


async def test_a_recoverer_reaches_no_further_than_it_must_and_releases_the_living(
    world: World,
) -> None:
    mirror, living = await world.open(), await world.open("living")
    await store(living, [segment(n) for n in range(3)])
    await world.left_by("dead", [segment(10)])
    later = [segment(n) for n in range(3)]
    await store(living, later)
    found = await world.recover(mirror)
    assert len(found.segments) == 1
    assert world.visible() == 6
    assert (world.mq.requests["reserve"], world.mq.requests["release"]) == (1, 3)
    reserved = [m.reserved_count for m in world.mq.queue("install").messages.values()]
    assert reserved == [1, 1, 1, 1, 0, 0, 0]


async def test_a_message_of_ours_that_our_books_do_not_know_is_recovered(world: World) -> None:
    mirror = await world.open(mirror_timeout=0.3)
    known, lost = segment(1), segment(2)
    await store(mirror, [known])
    world.mq.faults.rate("503", 1.0, call="post", after=True)
    with pytest.raises(MirrorUnavailable):
        await store(mirror, [lost])
    assert mirror.books.given_up
    world.mq.faults.clear()
    found = await world.recover(mirror)
    assert ids(found.segments) == [lost.id]
    assert not mirror.books.given_up
    await remove(mirror, [known, *found.segments])
    assert world.mq.queue("install").size == 0


async def test_what_is_being_appended_is_not_taken_for_lost(world: World) -> None:
    mirror = await world.open()
    await store(mirror, [segment(1)])
    world.mq.faults.next("late", call="post", after=True, seconds=0.3)
    appending = asyncio.create_task(store(mirror, [segment(2)]))
    await world.mq.until(lambda: world.mq.queue("install").size == 2)
    assert (await world.recover(mirror)).segments == []
    await appending
    assert (await world.recover(mirror)).segments == []
    assert world.visible() == 2


async def test_of_two_copies_one_is_recovered_and_both_go(world: World) -> None:
    world.mq.faults.rate("duplicate", 1.0)
    mirror = await world.open()
    stored = [segment(n) for n in range(3)]
    await world.left_by("dead", stored)
    world.mq.faults.clear()
    assert world.mq.queue("install").size == 6
    found = await world.recover(mirror)
    assert sorted(ids(found.segments)) == sorted(ids(stored))
    await remove(mirror, found.segments)
    assert world.mq.queue("install").size == 0


async def test_two_recoverers_share_what_a_dead_process_left(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    stored = [segment(n) for n in range(60)]
    await world.left_by("dead", stored)
    found = await asyncio.gather(world.recover(one), world.recover(two))
    taken = [*found[0].segments, *found[1].segments]
    assert sorted(ids(taken)) == sorted(ids(stored))


async def test_a_message_whose_lease_ran_out_is_not_deleted(world: World) -> None:
    """It is the only durable copy of what waits in memory. Others may have it."""
    mirror = await world.open()
    stored = [segment(n) for n in range(3)]
    await world.left_by("dead", stored)
    found = await world.recover(mirror)
    for expire in (lambda: world.clock.pass_(LEASE_S + 1), world.mq.expire_leases):
        expire()
        assert (await world.recover(mirror)).segments == []
        assert sorted(world.segments()) == sorted(ids(stored))
    await remove(mirror, found.segments)
    assert world.mq.queue("install").size == 0


@pytest.mark.parametrize("how", ["by our clock", "without our knowing"])
async def test_removal_after_the_lease_ran_out(world: World, how: str) -> None:
    mirror = await world.open()
    await world.left_by("dead", [segment(n) for n in range(3)])
    found = await world.recover(mirror)
    if how == "by our clock":
        world.clock.pass_(LEASE_S + 1)
    else:
        world.mq.expire_leases()
    await remove(mirror, found.segments)
    assert world.mq.queue("install").size == 0


async def test_leases_are_prolonged_while_a_load_waits_and_seldom(world: World) -> None:
    mirror, other = await world.open(), await world.open("other")
    await world.left_by("dead", [segment()])
    assert len((await world.recover(mirror)).segments) == 1
    for _ in range(30):
        world.clock.pass_(5)
        await mirror.keep(world.town)
        assert (await world.recover(other)).segments == []
    for _ in range(int(DAY_S / 5)):
        world.clock.pass_(5)
        await mirror.keep(world.town)
    assert len((await world.recover(other)).segments) == 1
    assert world.mq.requests["touch"] == 2


async def test_a_recoverer_that_is_killed_holds_nothing_up_for_long(world: World) -> None:
    mirror, heir = await world.open("mirror"), await world.open("heir")
    await world.left_by("dead", [segment()])
    assert len((await world.recover(mirror)).segments) == 1
    world.clock.pass_(LEASE_S + 1)
    assert len((await world.recover(heir)).segments) == 1


async def test_a_failure_midway_keeps_what_was_recovered(world: World) -> None:
    mirror = await world.open(mirror_timeout=0.3)
    for lane in ("install", "purchase"):
        await world.left_by(f"dead{lane}", [segment(1, lane)])
    world.mq.faults.next("503", call="reserve")
    with pytest.raises(MirrorUnavailable):
        await world.recover(mirror)
    world.mq.faults.next("late", call="reserve", seconds=0.2)
    recovering = asyncio.create_task(world.recover(mirror))
    await world.mq.until(lambda: world.visible("install") == 0)
    world.mq.faults.rate("503", 1.0)
    found = await recovering
    assert [each.lane for each in found.segments] == ["install"]
    assert found.more
    world.mq.faults.clear()
    assert [each.lane for each in (await world.recover(mirror)).segments] == ["purchase"]


async def test_an_empty_project_has_nothing_to_recover(world: World) -> None:
    mirror = await world.open()
    assert (await world.recover(mirror)).segments == []
    mirror.client._base = mirror.client._base[:-1] + "f"  # 404, as an empty project may answer
    assert (await world.recover(mirror)).segments == []


# --- a backlog ---


async def test_ten_thousand_messages_do_not_fill_memory(world: World) -> None:
    mirror = await world.open()
    stored: set[str] = set()
    for _ in range(100):
        batch = [segment(n, rows=2) for n in range(100)]
        world.mq.put("install", [pack(each, "dead", world.clock.now) for each in batch])
        stored.update(ids(batch))
    world.town.dead.add("dead")
    most = 0
    while stored:
        found = await world.recover(mirror)
        assert found.more == (len(stored) > len(found.segments) or len(found.segments) == 100)
        requests = world.mq.requests.total()
        assert (await world.recover(mirror)).segments == []
        assert world.mq.requests.total() == requests, "asked although there is no room"
        most = max(most, len(mirror.books.known))
        stored.difference_update(ids(found.segments))
        await remove(mirror, found.segments)
    assert most <= 200
    assert world.mq.queue("install").size == 0
    assert world.mq.requests.total() < 10_000 * 0.041


async def test_rows_that_are_recovered_are_bounded_by_what_they_unpack_to(world: World) -> None:
    """A few KB of a message can hold a MB of rows."""
    mirror = await world.open(buffer_max_bytes=16_000_000)
    row = b"7\t%b\n" % (b"x" * 1000)
    stored = [Segment("install", COLUMNS, row * 1000, 1000) for _ in range(20)]
    await world.left_by("dead", stored)
    assert world.mq.queue("install").size == 20
    total = 0
    while total < 20:
        found = await world.recover(mirror)
        assert 1 <= len(found.segments) <= 3
        total += len(found.segments)
        assert found.more or total == 20
        await remove(mirror, found.segments)
    assert not (await world.recover(mirror)).more


async def test_a_lane_that_can_not_be_loaded_holds_up_no_other(world: World) -> None:
    mirror = await world.open()
    await world.left_by("dead", [segment(n) for n in range(150)])
    assert len((await world.recover(mirror)).segments) == 100  # and they are never loaded
    world.town.types.remove("install")
    await world.left_by("late", [segment(1, "purchase")])
    world.clock.pass_(LEASE_S)
    assert [each.lane for each in (await world.recover(mirror)).segments] == ["purchase"]


# --- what is not ours ---


def bad_messages() -> dict[str, str]:
    good = json.loads(pack(segment(), "dead", 0.0))
    packed = good["rows"]
    short = base64.b64encode(base64.b64decode(packed)[:-9]).decode()
    return {
        "empty": "",
        "no JSON": "hello",
        "a lone surrogate": "\ud800",
        "an array": "[1]",
        "another form": json.dumps({"event": 1}),
        "a later version": json.dumps(good | {"datapipe": 2}),
        "rows cut off": json.dumps(good | {"rows": short}),
        "rows no base64": json.dumps(good | {"rows": packed[:-5] + "!" + packed[-4:]}),
        "rows no gzip": json.dumps(good | {"rows": "aGVsbG8="}),
        "fewer rows than told": json.dumps(good | {"events": 2}),
        "another lane": json.dumps(good | {"lane": "purchase"}),
    }


@pytest.mark.parametrize("kind", bad_messages())
async def test_a_message_that_can_not_be_read_is_set_aside(world: World, kind: str) -> None:
    mirror = await world.open()
    body = bad_messages()[kind]
    await world.left_by("dead", [segment(1)])
    world.mq.put("install", [body])
    await world.left_by("dead", [segment(2)])
    with capture_logs() as lines:
        found = await world.recover(mirror)
    assert len(found.segments) == 2
    assert world.mq.queue("install").size == 2
    assert world.mq.queue("install-unreadable").bodies == [body]
    assert world.mq.queue("install-unreadable").settings["message_expiration"] == 30 * DAY_S
    (line,) = [line for line in lines if line["event"] == "message unreadable"]
    assert (line["queue"], line["moved_to"]) == ("install", "install-unreadable")
    assert line["log_level"] == "error"


async def test_none_is_dropped_when_setting_aside_fails(world: World) -> None:
    mirror = await world.open(mirror_timeout=0.3)
    world.mq.put("install", ["hello"])
    world.mq.faults.rate("reset", 1.0, call="post", after=True)
    with pytest.raises(MirrorUnavailable):
        await world.recover(mirror)
    assert world.mq.queue("install").bodies == ["hello"]


async def test_other_queues_of_the_project_are_not_touched(world: World) -> None:
    names = ["Install", "install-unreadable", "datapipe_x", "orders", "a.b", "x" * 60]
    for name in names:
        world.mq.put(name, ["theirs", "theirs too"])
    mirror = await world.open()
    for _ in range(2):
        found = await world.recover(mirror)
        assert (found.segments, found.unregistered, found.more) == ([], set(), False)
        assert [world.visible(name) for name in names] == [2] * 6
        world.clock.pass_(6.9 * DAY_S)
    assert set(world.mq.requests) == {"list", "peek"}


async def test_a_type_that_is_not_registered_is_shown_and_kept(world: World) -> None:
    mirror = await world.open(ironmq_queue_prefix="p-")
    await store((await world.open("dead", ironmq_queue_prefix="p-")), [segment(1, "signup")])
    await store((await world.open("dead")), [segment(1, "other")])  # not under the prefix
    world.mq.put("p-strayed", [pack(segment(1, "signup"), "dead", 0.0)])
    world.town.dead.add("dead")
    found = await world.recover(mirror)
    assert (found.segments, found.unregistered) == ([], {"signup"})
    assert world.visible("p-signup") == world.visible("p-strayed") == 1


# --- age ---


async def test_own_messages_outlive_their_expiration(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n) for n in range(3)]
    await store(mirror, stored)
    for _ in range(100):
        world.clock.pass_(DAY_S)
        await mirror.keep(world.town)
        assert sorted(world.segments()) == sorted(ids(stored))
    assert world.mq.queue("install").total_messages == 3 + 4 * 3
    await remove(mirror, stored)
    assert world.mq.queue("install").size == 0
    assert mirror.state().bytes == 0


@pytest.mark.parametrize("lane", ["install", "signup"])
async def test_what_nobody_can_load_lives_if_a_process_runs_every_six_days(
    world: World, lane: str
) -> None:
    """A lane that is blocked here, or whose type is not registered; longer than a peek reaches."""
    world.town.types.clear()
    stored = [segment(n, lane) for n in range(120)]
    await world.left_by("process0", stored)
    for number in range(1, 20):
        world.clock.pass_(5.9 * DAY_S)
        async with AsyncExitStack() as stack:
            mirror = await world.open(f"process{number}")
            while (await world.recover(mirror)).more:
                pass
            await stack.aclose()
        assert sorted(world.segments(lane)) == sorted(ids(stored))
        assert world.visible(lane) == 120
    senders = {json.loads(body)["sender"] for body in world.mq.queue(lane).bodies}
    assert senders == {"process0"}


async def test_old_messages_of_the_living_are_theirs_to_keep(world: World) -> None:
    mirror, living = await world.open(), await world.open("living")
    world.town.types.clear()
    await store(living, [segment()])
    world.clock.pass_(ANEW_S + 1)
    assert (await world.recover(mirror)).unregistered == {"install"}
    assert world.mq.requests["reserve"] == 0


async def test_what_the_ledger_knows_is_not_posted_anew(world: World) -> None:
    """Its row would be gone before the new copy is."""
    mirror = await world.open()
    own, left = segment(1), segment(2, "signup")
    await store(mirror, [own])
    await world.left_by("dead", [left])
    world.town.ledger |= {own.id, left.id}
    world.clock.pass_(ANEW_S + 1)
    for _ in range(2):
        await mirror.keep(world.town)
        await world.recover(mirror)
    assert world.mq.queue("install").total_messages == 1
    assert world.mq.queue("signup").total_messages == 1
    assert world.mq.queue("signup").size == 0


async def test_without_the_database_old_messages_are_posted_anew_all_the_same(world: World) -> None:
    mirror = await world.open()
    own, left = segment(1), segment(2, "signup")
    await store(mirror, [own])
    await world.left_by("dead", [left])
    world.town.database_up = False
    world.clock.pass_(ANEW_S + 1)
    await mirror.keep(world.town)
    await world.recover(mirror)
    world.clock.pass_(ANEW_S - 1)
    assert (world.segments(), world.segments("signup")) == ([own.id], [left.id])


async def test_recovered_messages_that_wait_are_posted_anew_too(world: World) -> None:
    mirror = await world.open()
    await world.left_by("dead", [segment()])
    found = (await world.recover(mirror)).segments
    for _ in range(100):
        world.clock.pass_(DAY_S)
        await mirror.keep(world.town)
    assert world.segments() == ids(found)
    await remove(mirror, found)
    assert world.mq.queue("install").size == 0


async def test_one_that_is_loaded_while_it_is_posted_anew_leaves_no_copy(world: World) -> None:
    mirror = await world.open()
    stored = segment()
    await store(mirror, [stored])
    world.clock.pass_(ANEW_S + 1)
    world.mq.faults.next("late", call="post", seconds=0.2)
    keeping = asyncio.create_task(mirror.keep(world.town))
    await world.mq.until(lambda: world.mq.queue("install").size == 2)
    await remove(mirror, [stored])
    await keeping
    assert world.mq.queue("install").size == 0


async def test_appends_while_messages_are_kept(world: World) -> None:
    """New lanes appear while the old ones are gone through."""
    mirror = await world.open()
    await store(mirror, [segment()])
    world.clock.pass_(ANEW_S + 1)
    world.mq.faults.next("late", call="get", seconds=0.2)
    keeping = asyncio.create_task(mirror.keep(world.town))
    await world.mq.until(lambda: world.mq.requests["get"] == 1)
    await store(mirror, [segment(2, "purchase")])
    await keeping


# --- parked ---


def run_of(stored: Sequence[Segment]) -> Run:
    return Run(
        stored[0].lane, stored[0].source, stored[0].position - 1, stored[-1].position,
        len(stored), sum(each.events for each in stored), 0, 0.0,
    )  # fmt: skip


async def read_all(mirror: ironmq.IronMQ, run: Run, max_bytes: int) -> list[Segment]:
    found: list[Segment] = []
    while run.after < run.until and (some := await mirror.read(run, max_bytes)):
        assert sum(len(each.data) for each in some) <= max_bytes or len(some) == 1
        found += some
        run.after = some[-1].position
        await remove(mirror, some)
    return found


async def test_parked_messages_are_read_back_a_hundred_to_a_request(world: World) -> None:
    mirror = await world.open()
    stored = [segment(n) for n in range(1000)]
    await store(mirror, stored)
    assert world.mq.requests["put_queue"] == 1
    found = await read_all(mirror, run_of(stored), 1 << 20)
    assert [(each.id, each.data) for each in found] == [(each.id, each.data) for each in stored]
    assert world.mq.requests["delete_many"] == world.mq.requests["peek"] == 10
    assert world.mq.requests["get"] < 100  # those that overtook others on their way


async def test_parked_messages_behind_those_of_others_are_fetched(world: World) -> None:
    mirror, other = await world.open(), await world.open("other")
    await store(other, [segment(n) for n in range(99)])
    stored = [segment(n) for n in range(5)]
    await store(mirror, stored)
    assert ids(await read_all(mirror, run_of(stored), 25)) == ids(stored)


async def test_recovered_messages_that_were_parked_are_read_back(world: World) -> None:
    mirror = await world.open()
    await world.left_by("dead", [segment(n) for n in range(5)])
    found = (await world.recover(mirror)).segments
    again = await read_all(mirror, run_of(found), 1 << 20)
    assert [each.data for each in again] == [each.data for each in found]
    assert world.mq.queue("install").size == 0


async def test_a_parked_message_that_is_gone_is_told_to_be(world: World) -> None:
    mirror, other = await world.open(), await world.open("other")
    stored = [segment(n, rows=n + 1) for n in range(3)]
    await store(mirror, stored)
    taken = await other.client.reserve("install", 2, 60)
    await other.client.delete("install", [(m.id, m.reservation_id) for m in taken])
    found = await mirror.read(run_of(stored), 1 << 20)
    assert [(each.missing, each.id, each.events) for each in found] == [
        (True, stored[0].id, 1), (True, stored[1].id, 2), (False, stored[2].id, 3),
    ]  # fmt: skip


async def test_memory_that_lists_messages_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ironmq, "_HELD_LEAST", 100)
    mirror = await world.open(buffer_max_bytes=200 * 512)
    stored = [segment(n) for n in range(200)]
    await store(mirror, stored)
    with pytest.raises(MirrorFull, match="buffer_max_bytes"):
        await store(mirror, [segment()])
    await remove(mirror, stored[:1])
    await store(mirror, [segment()])


async def test_the_more_messages_wait_the_more_rows_share_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ironmq, "_CROWDED", 20)
    mirror = await world.open()
    assert mirror.traits.appends_at_once == 16
    stored = [segment(n) for n in range(400)]
    await store(mirror, stored[:100])
    assert mirror.traits.appends_at_once == 11
    await store(mirror, stored[100:])
    assert mirror.traits.appends_at_once == 1
    await remove(mirror, stored)
    assert mirror.traits.appends_at_once == 16


async def test_ironmq_max_bytes_is_what_may_wait_there(world: World) -> None:
    mirror = await world.open(ironmq_max_bytes=65_536)
    stored: list[Segment] = []
    while not mirror.state().full:
        rows = noise(50, seed=len(stored))
        stored += await store(mirror, [Segment("install", COLUMNS, rows, 50)])
    with pytest.raises(MirrorFull, match="ironmq_max_bytes"):
        await store(mirror, [segment()])
    assert mirror.state().up
    assert mirror.state().full
    assert mirror.state().bytes < 75_000
    await remove(mirror, stored)
    await store(mirror, [segment()])


def test_a_held_message_costs_what_is_counted() -> None:
    books = Books("me", "", lambda: 0.0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(20_000):
        each = segment(number)
        books.known[each.id] = Held.of(str(7 * 10**18 + number), each, 450, 1.8e9 + number)
        books.place([each])
    cost = (tracemalloc.get_traced_memory()[0] - before) / 20_000
    tracemalloc.stop()
    assert HELD_BYTES * 0.6 < cost < HELD_BYTES


# --- datapipe check ---


async def test_check_names_the_queues_and_changes_nothing(world: World) -> None:
    await world.left_by("dead", [segment(n) for n in range(3)])
    found = await check_mirror(world.settings())
    assert found == [
        ("ok", "ironmq: the credentials work, 1 queues"),
        ("ok", "ironmq queue install: 3 messages"),
    ]


async def test_check_warns_of_what_waits_for_a_type_that_is_not_registered(world: World) -> None:
    await world.left_by("dead", [segment(lane="signup"), segment()])
    found = await check_mirror(world.settings())
    (warning,) = (text for level, text in found if level == "warn")
    assert warning.startswith("ironmq: event type signup is not registered here; ")
    assert warning.endswith(": 1 message")


async def test_check_tells_wrong_credentials_from_an_ironmq_that_is_away(world: World) -> None:
    settings = world.settings(mirror_timeout=0.3)
    world.mq.token, token = "another", world.mq.token
    ((level, text),) = await check_mirror(settings)
    assert (level, "ironmq_token" in text, token in text) == ("fail", True, False)
    world.mq.token, world.mq.project_id = token, "5f00c0ffee00000000000009"
    world.mq._store._project_id = world.mq.project_id
    assert (await check_mirror(settings))[0][0] == "away"
    await world.mq.leave("closed")
    assert (await check_mirror(settings))[0][0] == "away"
