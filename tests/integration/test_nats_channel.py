"""Questions between processes that share a cluster: who answers, who is slow, and who is silent."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import pytest
from structlog.testing import capture_logs

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats.channel import SILENT_S, NatsChannel
from datapipe.mirrors.nats.client import Client
from tests.jetstream import NatsCluster
from tests.mirror_nats import Tap, settings_of

# a client of a cluster would find the other nodes beside a tap
alone = pytest.mark.parametrize("cluster", ["nats_node"], indirect=True)
How = Callable[[bytes], Awaitable[bytes]]


async def echo(question: bytes) -> bytes:
    return b"heard: " + question


class World:
    """Opens channels, each over a connection of its own."""

    def __init__(self, cluster: NatsCluster, prefix: str, stack: AsyncExitStack) -> None:
        self.cluster = cluster
        self._prefix = prefix
        self._stack = stack

    async def open(self, process: str, url: str | None = None) -> NatsChannel:
        more = {"nats_url": url} if url else {}
        client = Client(settings_of(self.cluster, self._prefix, **more))
        await self._stack.enter_async_context(client.connecting())
        await client.api("INFO")
        return NatsChannel(client, self._prefix, process)

    async def answer(self, channel: NatsChannel, how: How = echo) -> None:
        """Answer from now on; returns once a question arrives, on whatever node it was asked."""
        arrived = asyncio.Event()

        async def first(question: bytes) -> bytes:
            if question == b"are you there?":
                arrived.set()
                return b""
            return await how(question)

        await channel.answer(first)
        async with AsyncExitStack() as stack:
            mine, self._stack = self._stack, stack
            try:
                asker = await self.open("asker")
            finally:
                self._stack = mine
            while not arrived.is_set():
                await asker.ask(b"are you there?", set())
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await arrived.wait()


@pytest.fixture
async def world(cluster: NatsCluster, nats_prefix: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(cluster, nats_prefix, stack)


async def test_all_others_answer(world: World) -> None:
    one, two, three = [await world.open(name) for name in ("one", "two", "three")]
    for each in (one, two, three):
        await world.answer(each)
    began = time.monotonic()
    answers = await one.ask(b"who?", {"two", "three"})
    assert answers.by_process == {"two": b"heard: who?", "three": b"heard: who?"}
    assert answers.silent == set()
    assert time.monotonic() - began < SILENT_S  # nobody is waited for who has answered


async def test_who_is_not_expected_is_heard_too(world: World) -> None:
    """It has started a moment ago, and has sent no heartbeat yet."""
    one, two, three = [await world.open(name) for name in ("one", "two", "three")]
    await world.answer(two)
    await world.answer(three)
    answers = await one.ask(b"who?", {"two"})
    assert answers.by_process["two"] == b"heard: who?"
    assert answers.silent == set()
    assert len(answers.by_process) >= 1


async def test_one_that_is_silent_is_named(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await world.answer(two)
    began = time.monotonic()
    answers = await one.ask(b"who?", {"two", "dead"})
    assert answers.by_process == {"two": b"heard: who?"}
    assert answers.silent == {"dead"}
    assert SILENT_S - 0.1 < time.monotonic() - began < 2 * SILENT_S


async def test_one_that_is_slow_is_waited_for(world: World) -> None:
    async def slow(question: bytes) -> bytes:
        await asyncio.sleep(2 * SILENT_S)
        return b"at last"

    one, two, three = [await world.open(name) for name in ("one", "two", "three")]
    await world.answer(two, slow)
    await world.answer(three)
    answers = await one.ask(b"load", {"two", "three"})
    assert answers.by_process == {"two": b"at last", "three": b"heard: load"}
    assert answers.silent == set()


@alone
async def test_one_that_falls_silent_at_work_is_named(world: World) -> None:
    """Its signs of life end, as when it freezes."""
    async with Tap(world.cluster.nodes[0].url).running() as tap:
        one, two = await world.open("one"), await world.open("two", tap.url)
        working = asyncio.Event()

        async def slow(question: bytes) -> bytes:
            working.set()
            await asyncio.sleep(60)
            return b""

        await world.answer(two, slow)
        asking = asyncio.create_task(one.ask(b"load", {"two"}))
        await working.wait()
        await asyncio.sleep(0.3)
        tap.cut()
        tap.answers.clear()
        answers = await asyncio.wait_for(asking, SILENT_S + 3)
        assert (answers.by_process, answers.silent) == ({}, {"two"})


async def test_one_that_fails_is_named_and_logs_it(world: World) -> None:
    async def broken(question: bytes) -> bytes:
        raise ZeroDivisionError

    one, two = await world.open("one"), await world.open("two")
    await world.answer(two, broken)
    with capture_logs() as lines:
        answers = await one.ask(b"who?", {"two"})
    assert (answers.by_process, answers.silent) == ({}, {"two"})
    assert [line["event"] for line in lines] == ["fault"]


@alone
async def test_whoever_is_not_connected_can_ask_nobody(world: World) -> None:
    async with Tap(world.cluster.nodes[0].url).running() as tap:
        one = await world.open("one", tap.url)
    tap.cut()
    async with asyncio.timeout(20):
        while True:
            try:
                await one.ask(b"who?", {"two"})
            except MirrorUnavailable:
                break
            await asyncio.sleep(0.1)


async def test_a_large_answer_is_packed_and_one_that_is_too_large_is_a_line_in_the_log(
    world: World,
) -> None:
    async def megabytes(question: bytes) -> bytes:
        return b"install " * 1_000_000

    async def noise(question: bytes) -> bytes:
        return os.urandom(2_000_000)

    one, two, three = [await world.open(name) for name in ("one", "two", "three")]
    await world.answer(two, megabytes)
    await world.answer(three, noise)
    with capture_logs() as lines:
        answers = await one.ask(b"status", {"two", "three"})
    assert {name: len(body) for name, body in answers.by_process.items()} == {"two": 8_000_000}
    assert [line["event"] for line in lines] == ["answer to a peer is too large"]
    assert answers.silent <= {"three"}


@alone
async def test_an_answer_survives_a_connection_that_was_lost_and_is_there_again(
    world: World,
) -> None:
    async with Tap(world.cluster.nodes[0].url).running() as tap:
        one, two = await world.open("one"), await world.open("two", tap.url)
        await world.answer(two)
        tap.cut()
        async with asyncio.timeout(20):
            while not (await one.ask(b"who?", {"two"})).by_process:
                await asyncio.sleep(0.1)
