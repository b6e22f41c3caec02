"""What the NATS mirror gives to be loaded: each message to one process, while that holds it."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from unittest import mock

import pytest
from structlog.testing import capture_logs

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats import hand as hand_module
from datapipe.mirrors.nats import mirror as mirror_module
from datapipe.mirrors.nats import streams as streams_module
from datapipe.mirrors.nats.mirror import Nats
from tests.jetstream import NatsCluster, request
from tests.mirror_nats import (
    Members,
    has,
    ids,
    messages,
    opened,
    segment,
    settings_of,
    store,
    take_until,
)
from tests.service import until


async def test_one_take_gives_all_that_fits(cluster: NatsCluster, prefix: str) -> None:
    """Though the status that ends a pull overtakes the messages of a stream with replicas."""
    async with opened(cluster, prefix) as mirror:
        stored = [segment(n, size=2000) for n in range(300)]
        for at in range(0, 300, 100):
            await store(mirror, *stored[at : at + 100])
        taken: list[str] = []
        takes = 0
        while some := await mirror.take("install", 230_000):
            takes += 1
            taken += ids(some)
            await mirror.remove(some)
        assert taken == ids(stored)
        assert takes <= 5


async def test_one_that_is_larger_than_a_take_does_not_stop_the_lane(
    cluster: NatsCluster, prefix: str
) -> None:
    async with opened(cluster, prefix) as mirror:
        stored = [segment(0, size=50_000), *(segment(n) for n in range(1, 30))]
        await store(mirror, *stored)
        assert ids(await mirror.take("install", 10_000)) == ids(stored[:1])
        assert ids(await take_until(mirror, 29)) == ids(stored[1:])


async def test_what_is_redelivered_to_us_is_not_taken_twice(
    cluster: NatsCluster, prefix: str
) -> None:
    with mock.patch.object(streams_module, "ACK_WAIT_S", 0.5):  # of the consumer alone: no +WPI
        async with opened(cluster, prefix) as mirror:
            await store(mirror, *[segment(n) for n in range(3)])
            taken = await take_until(mirror, 3)
            before = {held.reply for held in mirror.hand.held.values()}
            await asyncio.sleep(0.8)
            assert await mirror.take("install", 1_000_000) == []
            assert not before & {held.reply for held in mirror.hand.held.values()}  # the new ones
            assert mirror.waiting("install").in_memory == 3
            await mirror.remove(taken)
            await until(partial(has, cluster, prefix, 0))
            assert await mirror.take("install", 1_000_000) == []


async def test_work_is_held_longer_than_ack_wait(
    nats_cluster: NatsCluster, nats_prefix: str
) -> None:
    with (
        mock.patch.object(streams_module, "ACK_WAIT_S", 1.0),
        mock.patch.object(hand_module, "ACK_WAIT_S", 1.0),
    ):
        async with (
            opened(nats_cluster, nats_prefix) as one,
            opened(nats_cluster, nats_prefix, "two") as two,
        ):
            await store(one, segment(1))
            taken = await take_until(one, 1)
            ends = time.monotonic() + 3.0
            while time.monotonic() < ends:
                assert await two.take("install", 1_000_000) == []
            await one.remove(taken)
            await until(partial(has, nats_cluster, nats_prefix, 0))


async def test_what_is_requeued_is_taken_next(cluster: NatsCluster, prefix: str) -> None:
    """In order, but for what a take left of it, which the server moves to the front."""
    async with opened(cluster, prefix) as mirror:
        stored = [segment(n) for n in range(150)]
        await store(mirror, *stored)
        first = ids(await mirror.take("install", 25_000))
        assert 80 < len(first) < 120
        assert first == ids(stored[: len(first)])
        for _ in range(3):
            mirror.requeue("install", list(stored[: len(first)]), put_off=False)
            again = await mirror.take("install", 25_000)
            again += await mirror.take("install", 250 * (len(first) - len(again)))
            assert sorted(ids(again)) == sorted(first)
        await take_until(mirror, 150 - len(first))


async def test_what_is_put_off_goes_to_others_after_a_moment(
    cluster: NatsCluster, prefix: str
) -> None:
    async with opened(cluster, prefix) as one, opened(cluster, prefix, "two") as two:
        await store(one, segment(1))
        began = time.monotonic()
        one.requeue("install", await take_until(one, 1), put_off=True)
        await take_until(two, 1)
        assert 0.9 < time.monotonic() - began < 3


async def test_one_that_put_a_lane_off_waits_for_it_itself(
    cluster: NatsCluster, prefix: str
) -> None:
    """Or it would say at each interval that nothing waits."""
    async with opened(cluster, prefix) as one:
        await store(one, segment(1))
        one.requeue("install", await take_until(one, 1), put_off=True)
        assert len(await one.take("install", 1000)) == 1


async def test_a_stop_lets_others_have_at_once_what_is_in_hand(
    cluster: NatsCluster, prefix: str
) -> None:
    async with opened(cluster, prefix) as one, opened(cluster, prefix, "two") as two:
        await store(two, segment(1), segment(2))
        await take_until(two, 2)
        await two.settle(2.0)
        began = time.monotonic()
        await take_until(one, 2)
        assert time.monotonic() - began < streams_module.ACK_WAIT_S / 6


async def test_messages_that_are_not_ours_stay_and_hurt_nobody(
    cluster: NatsCluster, prefix: str
) -> None:
    async with opened(cluster, prefix) as mirror:
        await store(mirror, segment(1))
        async with cluster.client() as client:
            await client.request(f"{prefix}.install.5", b"what is this?", timeout=5)
            await client.request(f"{prefix}.install.many", b"1.0 [1,[],[],true]\n", timeout=5)
            await client.request(
                f"{prefix}.install.2", b"x\ny", headers={"Nats-Msg-Id": "theirs"}, timeout=5
            )
        await store(mirror, segment(2))
        with capture_logs() as lines:
            taken = await take_until(mirror, 2)
            assert await mirror.take("install", 1_000_000) == []
        errors = [line for line in lines if line["event"] == "message unreadable"]
        assert [line["sequence"] for line in errors] == [2, 3, 4]  # once each
        await mirror.remove(taken)
        await until(partial(has, cluster, prefix, 3))
        await mirror.keep(Members())
        assert mirror.waiting("install").events == 7
        assert mirror.waiting("install").in_memory == 0


@pytest.mark.parametrize("what", ["STREAM.DELETE.{}", "CONSUMER.DELETE.{}.load"])
async def test_what_was_deleted_by_hand_is_made_again(
    cluster: NatsCluster, prefix: str, what: str
) -> None:
    async with opened(cluster, prefix) as mirror:
        await store(mirror, segment(1))
        await mirror.remove(await take_until(mirror, 1))
        async with cluster.client() as client:
            await request(client, what.format(f"{prefix}_install"), {})
        await store(mirror, segment(2))
        assert len(await _taken_after_errors(mirror)) == 1
        assert await messages(cluster, prefix) == 1


async def test_a_stream_that_was_deleted_is_made_again_by_a_take(
    cluster: NatsCluster, prefix: str
) -> None:
    async with opened(cluster, prefix) as one, opened(cluster, prefix, "two") as two:
        await store(one, segment(1))
        await one.remove(await take_until(one, 1))
        async with cluster.client() as client:
            await request(client, f"STREAM.DELETE.{prefix}_install", {})
        with pytest.raises(MirrorUnavailable):
            async with asyncio.timeout(10):  # the consumer's leader may not know it yet
                while await one.take("install", 1000) == []:
                    await asyncio.sleep(0.01)
        assert await messages(cluster, prefix) == 0  # it is there again
        await store(two, segment(2))
        assert len(await _taken_after_errors(one)) == 1


async def _taken_after_errors(mirror: Nats) -> list[object]:
    async with asyncio.timeout(20):
        while True:
            try:
                if taken := await mirror.take("install", 1_000_000):
                    return list(taken)
            except MirrorUnavailable:
                pass
            await asyncio.sleep(0.05)


async def test_nothing_is_taken_before_the_database_is_known(
    cluster: NatsCluster, prefix: str
) -> None:
    async with mirror_module.open_nats(settings_of(cluster, prefix), "one") as mirror:
        await store(mirror, segment(1))
        with pytest.raises(MirrorUnavailable):
            await mirror.take("install", 1000)
