"""What the NATS mirror says of what waits."""

from __future__ import annotations

import asyncio
import math
import time
from unittest import mock

import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats import streams as streams_module
from datapipe.mirrors.nats.mirror import open_nats
from tests.jetstream import NatsCluster
from tests.mirror_nats import (
    Members,
    Tap,
    info,
    opened,
    segment,
    settings_of,
    store,
    take_until,
)
from tests.service import until

MEMBERS = Members()


async def test_what_waits_is_known_to_all_after_a_look(
    nats_cluster: NatsCluster, nats_prefix: str
) -> None:
    cluster, prefix = nats_cluster, nats_prefix
    async with opened(cluster, prefix) as one, opened(cluster, prefix, "two") as two:
        mine, theirs = one.waiting("install"), two.waiting("install")
        assert theirs.events == 0
        await store(one, *[segment(n, rows=n) for n in range(1, 5)])
        assert mine.events == 10  # at once
        await two.keep(MEMBERS)
        assert (theirs.events, theirs.in_memory, theirs.parked) == (10, 0, 10)
        stored = (await info(cluster, prefix))["state"]
        assert theirs.bytes == stored["bytes"]

        taken = await take_until(one, 4)
        await two.keep(MEMBERS)
        assert (mine.events, mine.in_memory, mine.parked) == (10, 10, 0)
        assert (theirs.events, theirs.in_memory, theirs.parked) == (10, 0, 10)

        removal = one.remove(taken[:2])
        assert (mine.events, mine.in_memory) == (7, 7)  # at once
        await removal
        await store(two, segment(0, rows=5))
        assert theirs.events in (15, 12)  # it has not looked since, or had to, as nobody answered

        async def seen() -> bool:
            await one.keep(MEMBERS)
            await two.keep(MEMBERS)
            return mine.events == theirs.events == 12

        await until(seen)
        one.requeue("install", taken[2:], put_off=False)
        assert (mine.events, mine.in_memory) == (12, 0)


async def test_what_is_shown_between_looks_is_about_what_a_look_shows(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with opened(nats_node, nats_prefix) as mirror:
        waiting = mirror.waiting("install")
        await store(mirror, *[segment(n, size=1000) for n in range(100)])
        between = waiting.bytes
        await mirror.keep(MEMBERS)
        assert 0.7 * waiting.bytes < between <= waiting.bytes
        await mirror.remove(await take_until(mirror, 100))
        assert (waiting.events, waiting.bytes, waiting.oldest) == (0, 0, None)


async def test_the_age_of_the_oldest(nats_cluster: NatsCluster, nats_prefix: str) -> None:
    cluster, prefix = nats_cluster, nats_prefix
    async with opened(cluster, prefix) as one, opened(cluster, prefix, "two") as two:
        theirs = two.waiting("install")
        assert theirs.oldest == -math.inf  # never looked
        await two.keep(MEMBERS)
        assert theirs.oldest is None
        await store(one, segment(1))
        stored = time.time()
        await asyncio.sleep(1.1)
        await store(one, segment(2))
        await two.keep(MEMBERS)
        assert theirs.oldest == pytest.approx(stored, abs=0.5)
        assert one.waiting("install").oldest == pytest.approx(stored, abs=0.5)
        taken = await one.take("install", 1)
        await two.keep(MEMBERS)
        assert theirs.oldest == pytest.approx(stored, abs=0.5)  # it waits until it is loaded
        await one.remove(taken)

        async def newer() -> bool:
            await two.keep(MEMBERS)
            return (theirs.oldest or 0.0) > stored + 0.6

        await until(newer)
        with mock.patch.object(streams_module, "_UNKNOWN_S", 0.0):
            assert theirs.oldest == -math.inf


async def test_a_look_that_fails_leaves_the_age_unknown_in_the_end(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    """Something may have come since that keeps idempotency keys from being forgotten."""
    async with (
        Tap(nats_node.nodes[0].url).running() as tap,
        opened(nats_node, nats_prefix, nats_url=tap.url) as mirror,
    ):
        await store(mirror, segment(1))
        await mirror.remove(await take_until(mirror, 1))
        await mirror.keep(MEMBERS)
        assert mirror.waiting("install").oldest is None
        tap.answers.clear()
        with (
            mock.patch.object(streams_module, "_UNKNOWN_S", 1.0),
            mock.patch.object(streams_module, "_UNSEEN_S", 0.0),
        ):
            await asyncio.sleep(1.0)
            with pytest.raises(MirrorUnavailable):
                await mirror.keep(MEMBERS)
            assert mirror.waiting("install").oldest == -math.inf
            tap.answers.set()
            await mirror.keep(MEMBERS)
            assert mirror.waiting("install").oldest is None


async def test_lanes_in_which_nothing_waits_are_looked_at_too(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    """Another process may store there; but a hundred of them are not asked for each second."""
    lanes = [f"lane_{n}" for n in range(100)]
    async with opened(nats_node, nats_prefix) as mirror:
        for lane in lanes:
            mirror.waiting(lane)
        await mirror.keep(MEMBERS)
        before = mirror.state().calls["STREAM.INFO"]
        await mirror.keep(MEMBERS)
        assert mirror.state().calls["STREAM.INFO"] == before
        async with opened(nats_node, nats_prefix, "two") as two:
            await store(two, segment(1, lanes[50]))

        async def seen() -> bool:
            await mirror.keep(MEMBERS)
            return mirror.waiting(lanes[50]).events == 1

        await until(seen)


async def test_lanes_that_nobody_registered_are_found(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    members = Members()
    members.unregistered = {"old", "empty"}
    async with opened(nats_node, nats_prefix) as one:
        await store(one, segment(1, "old"), segment(2, "empty"))
        await one.remove(await take_until(one, 1, "empty"))
        async with open_nats(settings_of(nats_node, nats_prefix), "two") as two:
            found = await two.recover(members)
            assert (found.unregistered, found.due, found.lanes) == ({"old"}, {"old"}, {})
            assert two.waiting("old").events == 1


async def test_a_stream_that_can_not_be_seen_at_the_start_holds_up_its_lane_alone(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with opened(nats_node, nats_prefix) as one:
        await store(one, segment(1), segment(2, "purchase"))
    async with open_nats(settings_of(nats_node, nats_prefix), "two") as mirror:
        members = Members()
        look_at = mirror.streams.look_at

        async def not_installs(stream: streams_module.Stream, timeout_s: float = 2.0) -> None:
            if stream.lane == "install":
                raise MirrorUnavailable("it has no leader")
            await look_at(stream, timeout_s)

        with mock.patch.object(mirror.streams, "look_at", not_installs):
            assert (await mirror.recover(members)).due == {"purchase"}
            await mirror.keep(members)
            assert len(await take_until(mirror, 1, "purchase")) == 1
            with pytest.raises(MirrorUnavailable):
                await mirror.take("install", 1000)
        assert (await mirror.recover(members)).due == {"install"}
        assert len(await take_until(mirror, 1)) == 1
