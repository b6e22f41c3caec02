"""What the NATS mirror does when it stores: once, in pieces that fit, or it says why not."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from datapipe.errors import MirrorFull, MirrorUnavailable
from datapipe.mirrors.nats import mirror as mirror_module
from datapipe.mirrors.nats import streams as streams_module
from datapipe.mirrors.nats.mirror import Nats
from tests.jetstream import NatsCluster
from tests.mirror_nats import (
    Tap,
    ids,
    info,
    keyed,
    messages,
    opened,
    segment,
    store,
    take_until,
)

LANE_BYTES = 2 << 20


# --- once ---


async def test_an_append_whose_answer_is_late_is_stored_once(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with Tap(nats_node.nodes[0].url).running() as tap:
        with mock.patch.object(mirror_module, "ANSWER_S", 0.3):
            async with opened(nats_node, nats_prefix, nats_url=tap.url) as mirror:
                await store(mirror, segment(0))
                tap.answers.clear()
                before = mirror.state().calls["publish"]
                append = asyncio.create_task(mirror.append([segment(1)]))
                async with asyncio.timeout(10):
                    while mirror.state().calls["publish"] < before + 3:
                        await asyncio.sleep(0.02)
                assert await messages(nats_node, nats_prefix) == 2  # it has arrived
                assert not append.done()
                tap.answers.set()
                appended = await append
                assert (len(appended.stored), appended.error) == (1, None)
                assert mirror.waiting("install").events == 2
    assert await messages(nats_node, nats_prefix) == 2


async def test_an_append_is_given_up_after_mirror_timeout(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with Tap(nats_node.nodes[0].url).running() as tap:
        one = opened(nats_node, nats_prefix, nats_url=tap.url, mirror_timeout=1.5)
        async with one as mirror:
            await store(mirror, segment(0))
            tap.answers.clear()
            began = time.monotonic()
            appended = await mirror.append([segment(1)])
            assert 0.5 < time.monotonic() - began < 2.5
            assert not appended.stored
            assert isinstance(appended.error, MirrorUnavailable)
            assert not isinstance(appended.error, MirrorFull)
            assert mirror.waiting("install").events == 1
            assert not mirror.state().up
            tap.answers.set()
            await store(mirror, segment(2))
            assert mirror.state().up


async def test_an_append_over_a_connection_that_breaks_is_stored_once(
    nats_node: NatsCluster, nats_prefix: str
) -> None:
    async with (
        Tap(nats_node.nodes[0].url).running() as tap,
        opened(nats_node, nats_prefix, nats_url=tap.url) as mirror,
    ):
        await store(mirror, segment(0))
        tap.answers.clear()
        append = asyncio.create_task(mirror.append([segment(1)]))
        async with asyncio.timeout(10):
            while await messages(nats_node, nats_prefix) < 2:
                await asyncio.sleep(0.02)
        tap.cut()
        tap.answers.set()
        assert (await append).error is None
    assert await messages(nats_node, nats_prefix) == 2


# --- what can't be stored ---


@pytest.mark.parametrize("nodes", [1, 3])
async def test_a_lane_that_finds_no_room_is_refused_alone_until_there_is(
    tmp_path: Path, nodes: int
) -> None:
    """In a cluster, who places a stream hears every few seconds alone what is reserved."""
    with (
        NatsCluster.running(tmp_path, nodes, max_file="3MB") as small,
        mock.patch.object(streams_module, "_REFUSED_S", 0.5),
    ):
        async with opened(small, "t", nats_lane_max_bytes=LANE_BYTES) as mirror:
            async with asyncio.timeout(30):
                # servers that have just started may not know yet how much room each has
                while (await mirror.append([segment(1)])).error is not None:
                    await asyncio.sleep(0.2)
            numbers = itertools.count()
            async with asyncio.timeout(30):
                while True:
                    lane = f"lane_{next(numbers)}"
                    if (await mirror.append([segment(1, lane)])).error is not None:
                        break
                    await asyncio.sleep(1)
            for _ in range(2):  # from what is known, or asked anew
                appended = await mirror.append([segment(1, lane)])
                assert isinstance(appended.error, MirrorFull)
                assert f"reserves {LANE_BYTES} bytes" in appended.error.detail
                assert "nats_lane_max_bytes" in appended.error.detail
                assert mirror.full(["install", lane]) == {lane: appended.error.detail}
                await asyncio.sleep(0.5)
            assert mirror.state().up  # nothing is to be repaired there
            await store(mirror, segment(2))
            await small.delete_streams("t")
            async with asyncio.timeout(30):
                while (await mirror.append([segment(3, lane)])).error is not None:
                    await asyncio.sleep(0.2)
            assert mirror.full([lane]) == {}


async def test_without_a_quorum_nothing_is_promised_and_it_heals(own_nats: NatsCluster) -> None:
    async with opened(own_nats, "t", mirror_timeout=2.0) as mirror:
        await store(mirror, segment(0))
        for node in own_nats.nodes[1:]:
            await asyncio.to_thread(node.kill)
        appended = await mirror.append([segment(1)])
        assert isinstance(appended.error, MirrorUnavailable)
        assert not isinstance(appended.error, MirrorFull)
        assert not appended.stored
        await asyncio.to_thread(own_nats.start)
        later = segment(2)
        async with asyncio.timeout(30):
            while (await mirror.append([later])).error is not None:
                await asyncio.sleep(0.1)
        assert await messages(own_nats, "t") in (2, 3)  # the one that was refused may be there


# --- what does not fit into one message ---


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """A server whose messages have at most 64 KiB."""
    folder = tmp_path_factory.mktemp("narrow")
    with NatsCluster.running(folder, 1, more="max_payload: 65536") as alone:
        yield alone


async def stored_rows(mirror: Nats, pieces: int) -> bytes:
    return b"".join(each.data for each in await take_until(mirror, pieces))


async def test_a_segment_that_does_not_fit_is_cut_at_rows(narrow: NatsCluster) -> None:
    async with opened(narrow, "rows") as mirror:
        large = segment(7, size=1000, rows=200)
        appended = await mirror.append([segment(0), large, segment(1)])
        assert appended.error is None
        pieces = appended.stored[1:-1]
        assert len(pieces) == 4
        assert len(set(ids(appended.stored))) == len(appended.stored)
        assert b"".join(each.data for each in pieces) == large.data
        assert sum(each.events for each in appended.stored) == 202
        assert mirror.waiting("install").events == 202
        rows = await stored_rows(mirror, 6)
        assert sorted(rows.splitlines()) == sorted(
            [*large.data.splitlines(), *segment(0).data.splitlines(), *segment(1).data.splitlines()]
        )


async def test_a_part_of_a_keyed_post_is_never_cut(narrow: NatsCluster) -> None:
    async with opened(narrow, "parts") as mirror:
        large = keyed(5, 25_000)
        appended = await mirror.append([large])
        assert appended.error is None
        assert len(appended.stored) > 1
        parts = [part for piece in appended.stored for part in piece.parts]
        assert [part.number for part in parts] == list(range(5))
        for piece in appended.stored:
            assert sum(part.end - part.start for part in piece.parts) == len(piece.data)


@pytest.mark.parametrize("too_large", [segment(1, size=70_000), keyed(2, 70_000)])
async def test_what_can_not_be_cut_is_refused_with_the_reason(
    narrow: NatsCluster, too_large: object
) -> None:
    async with opened(narrow, "large") as mirror:
        appended = await mirror.append([too_large, segment(2)])  # type: ignore[list-item]
        assert isinstance(appended.error, MirrorFull)
        assert "max_payload" in appended.error.detail
        assert [each.events for each in appended.stored] == [1]


# --- replicas ---


@pytest.mark.parametrize("nodes", [1, 2, 3])
async def test_a_stream_has_as_many_replicas_as_there_are_nodes(tmp_path: Path, nodes: int) -> None:
    with NatsCluster.running(tmp_path / "nats", nodes) as cluster:
        async with opened(cluster, "t") as mirror:
            await store(mirror, segment(1))
            assert (await info(cluster, "t"))["config"]["num_replicas"] == nodes


async def test_a_node_that_is_down_is_still_one_of_them(own_nats: NatsCluster) -> None:
    async with opened(own_nats, "t", mirror_timeout=3.0) as mirror:
        await store(mirror, segment(0))
        await asyncio.to_thread(own_nats.nodes[2].kill)
        async with asyncio.timeout(30):  # it may be chosen to lead the new stream
            while (await mirror.append([segment(1, "purchase")])).error is not None:
                await asyncio.sleep(0.2)
        assert (await info(own_nats, "t", "purchase"))["config"]["num_replicas"] == 3
