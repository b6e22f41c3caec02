"""One lane's trouble is no other's: what is looked at, due, pruned and in a hurry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors import Membership
from datapipe.mirrors.nats import mirror as mirror_module
from datapipe.mirrors.nats import streams as streams_module
from datapipe.mirrors.nats.client import ANSWER_S
from datapipe.mirrors.nats.mirror import Nats
from datapipe.mirrors.nats.prune import SPREAD_S
from datapipe.mirrors.nats.streams import Stream
from datapipe.pipeline.coordinator import Coordinator
from datapipe.settings import Settings
from tests.mirror_nats import Members

MEMORY_BYTES = 1000


class World:
    """A mirror whose streams hold `bytes`, by lane; the lanes in `unseen` can't be looked at."""

    def __init__(self) -> None:
        client: Any = SimpleNamespace()
        settings = Settings(
            mirror="nats", nats_url="nats://h:1", buffer_max_bytes=MEMORY_BYTES,
            load_trigger_bytes=100,
        )  # fmt: skip
        self.mirror = Nats(client, settings, "one")
        paired: Any = SimpleNamespace(seen=True, look=mock.AsyncMock())
        self.mirror._pairing = paired
        streams: Any = self.mirror.streams
        streams.look_at = self._look_at
        streams.names = mock.AsyncMock(side_effect=lambda: [f"datapipe_{n}" for n in self.bytes])
        self.bytes: dict[str, int] = {"install": 0, "purchase": 0}
        self.unseen: set[str] = set()
        self.looks: list[str] = []
        self.waits_s: list[float] = []
        self.now = 1_000_000.0  # by the database's clock
        self.members = Members(clock=lambda: self.now)

    async def _look_at(self, stream: Stream, timeout_s: float = ANSWER_S) -> None:
        self.looks.append(stream.lane)
        self.waits_s.append(timeout_s)
        stream.unseen_at = time.monotonic()
        if stream.lane in self.unseen:
            raise MirrorUnavailable(f"{stream.lane} has no leader")
        waits = self.bytes.get(stream.lane, 0)
        stamp = "2026-01-01T00:00:00+00:00"
        state = {
            "first_seq": 11, "last_seq": 11 if waits else 10, "messages": int(waits > 0),
            "bytes": waits, "subjects": {f"datapipe.{stream.lane}.1": 1} if waits else None,
            "first_ts": stamp,
        }  # fmt: skip
        stream.saw({"ts": stamp, "state": state, "config": {"max_bytes": 1 << 20}})
        stream.unseen_at = float("-inf")

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        await self.mirror.recover(self.members)


@pytest.fixture
def world() -> Iterator[World]:
    with mock.patch.object(mirror_module, "_PRESSED_S", -1.0):
        yield World()


# --- looks ---


async def test_one_that_can_not_be_seen_fails_no_look_while_others_can(world: World) -> None:
    await world.mirror.recover(world.members)
    world.unseen = {"install"}
    with mock.patch.object(streams_module, "_UNSEEN_S", 0.2):
        world.mirror.streams.of("install").active = True  # it alone is looked at
        world.looks.clear()
        await world.mirror.keep(world.members)
        assert world.looks == ["install"]
        await world.mirror.keep(world.members)
        assert world.looks == ["install"]  # not again at once
        await asyncio.sleep(0.3)
        world.unseen = {"install", "purchase"}
        with pytest.raises(MirrorUnavailable):
            await world.mirror.keep(world.members)


async def test_one_that_can_not_be_seen_holds_up_the_looks_at_others_only_once(
    world: World,
) -> None:
    await world.mirror.recover(world.members)
    world.unseen = {"install"}
    world.waits_s.clear()
    for _ in range(2):
        stream = world.mirror.streams.of("install")
        stream.active = True
        await world.mirror.keep(world.members)
        stream.unseen_at -= 3600  # as if it were time for another look
    first_s, again_s = world.waits_s
    assert again_s * 4 <= first_s == ANSWER_S


async def test_what_is_seen_again_is_due(world: World) -> None:
    world.bytes = {"install": 1, "purchase": 1}
    world.unseen = {"install"}
    assert (await world.mirror.recover(world.members)).due == {"purchase"}
    assert (await world.mirror.recover(world.members)).due == set()
    world.unseen = set()
    assert (await world.mirror.recover(world.members)).due == {"install"}


async def test_other_faults_of_a_look_are_not_passed_over(world: World) -> None:
    await world.mirror.recover(world.members)
    broken: Any = world.mirror.streams
    broken.look_at = mock.AsyncMock(side_effect=KeyError("state"))
    with pytest.raises(KeyError):
        await world.mirror.recover(world.members)


@pytest.mark.parametrize("fails", [False, True])
async def test_the_loader_is_woken_even_if_the_mirror_was_not_kept(fails: bool) -> None:
    """Other processes' events may be due in lanes that could be seen."""

    class Kept:
        traits = SimpleNamespace(shared=True, keep_interval_s=1.0)

        async def keep(self, membership: Membership) -> bool:
            if fails:
                raise MirrorUnavailable("no answer")
            return False

    removed = SimpleNamespace(take=lambda count: None)
    buffer: Any = SimpleNamespace(
        mirror=Kept(), wake=asyncio.Event(), removed=removed, removed_bytes=0
    )
    none: Any = None
    coordinator = Coordinator(buffer, none, none, "one", [])
    with suppress(MirrorUnavailable):
        await coordinator._keep()
    assert buffer.wake.is_set()


# --- pruning ---


async def test_the_ledger_of_others_is_pruned_while_one_can_not_be_seen(world: World) -> None:
    await world.mirror.recover(world.members)
    world.unseen = {"install"}
    await world.pass_time(60)
    await world.pass_time(SPREAD_S)
    assert [lane for lane, _ in world.members.forgotten] == ["purchase"]


async def test_what_was_seen_before_the_note_was_made_is_not_noted_by_it(world: World) -> None:
    """What it was like then says nothing of what was stored until the note's time."""
    await world.mirror.recover(world.members)
    world.unseen = {"install"}
    stale = world.mirror.streams.of("install")
    before = (stale.first_seq, stale.last_seq)
    for _ in range(60):
        await world.pass_time(60)
    assert "install" not in [lane for lane, _ in world.members.forgotten]
    assert (stale.first_seq, stale.last_seq) == before
    world.unseen = set()
    await world.pass_time(60)
    assert "install" not in [lane for lane, _ in world.members.forgotten]  # first it is passed
    await world.pass_time(SPREAD_S)
    assert ("install", 1_000_000.0 - SPREAD_S) in world.members.forgotten


# --- pressure ---


async def test_what_nobody_here_can_load_presses_nobody(world: World) -> None:
    world.bytes = {"install": 0, "old": MEMORY_BYTES}
    world.members.unregistered = {"old"}
    await world.mirror.recover(world.members)
    assert not world.mirror.pressed
    world.bytes["install"] = MEMORY_BYTES // 2
    await world.mirror.recover(world.members)
    assert world.mirror.pressed


async def test_what_is_put_off_presses_nobody_until_it_is_tried_again(world: World) -> None:
    world.bytes = {"install": MEMORY_BYTES, "purchase": 1}
    await world.mirror.recover(world.members)
    assert world.mirror.pressed
    world.mirror.requeue("install", [], put_off=True)
    assert not world.mirror.pressed
    world.mirror.requeue("install", [], put_off=False)
    assert world.mirror.pressed
