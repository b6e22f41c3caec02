"""When a connection to a node that is of no use is left for another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import nats.errors
import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats import client as client_module
from datapipe.mirrors.nats.client import Client
from datapipe.mirrors.nats.connection import text
from datapipe.settings import Settings

SILENT_S = 0.1
FINE = b"{}"
NO_QUORUM = b'{"error":{"code":503,"err_code":10008,"description":"no quorum"}}'


class Node:
    """A connection to one that gives these answers, by subject; None: none in time."""

    def __init__(self, answers: dict[str, bytes | None]) -> None:
        self._answers = answers
        self.lost = asyncio.Event()

    async def request(self, subject: str, payload: bytes, **more: Any) -> mock.Mock:
        await asyncio.sleep(0.005)
        answer = self._answers[subject.removeprefix("$JS.API.")]
        if answer is None:
            raise nats.errors.TimeoutError
        return mock.Mock(data=answer)


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    with mock.patch.object(client_module, "_SILENT_S", SILENT_S):
        yield


async def left(*answers: tuple[str, bytes | None]) -> bool:
    """Whether it is left when it is asked that again and again for much longer than it takes."""
    client = Client(Settings(mirror="nats", nats_url="nats://127.0.0.1:1"))
    node: Any = Node(dict(answers))
    client._connection = node
    client._connected.set()
    with suppress(TimeoutError):
        async with asyncio.timeout(3 * SILENT_S):
            while not node.lost.is_set():
                for subject, _ in answers:
                    with suppress(MirrorUnavailable):
                        if subject == "t.install.1":
                            await client.request("publish", subject)
                        else:
                            await client.api(subject)
    return node.lost.is_set()


async def test_one_dead_stream_among_healthy_ones_is_no_reason() -> None:
    dead, healthy = ("STREAM.INFO.dead", None), ("STREAM.INFO.healthy", FINE)
    assert not await left(dead, healthy)
    assert not await left(healthy, dead)
    assert not await left(dead, dead, healthy)


async def test_infos_excuse_no_publish_that_is_not_answered() -> None:
    """A leader that has lost the others goes on answering them."""
    assert await left(("t.install.1", None), ("STREAM.INFO.install", FINE))
    assert await left(("t.install.1", NO_QUORUM), ("CONSUMER.INFO.install.load", FINE))


async def test_a_publish_that_is_answered_excuses_infos() -> None:
    assert not await left(("STREAM.INFO.install", None), ("t.install.1", FINE))


@pytest.mark.parametrize("answer", [None, NO_QUORUM])
async def test_infos_that_are_all_in_vain_are(answer: bytes | None) -> None:
    assert await left(("STREAM.INFO.install", answer), ("CONSUMER.INFO.install.load", answer))


async def test_what_was_sent_once_connected_shows_that_it_works() -> None:
    """However often connecting failed while it waited."""
    client = Client(Settings(mirror="nats", nats_url="nats://127.0.0.1:1"))
    node: Any = Node({"STREAM.INFO.t": FINE})
    client._connection = node
    asking = asyncio.create_task(client.api("STREAM.INFO.t"))
    await asyncio.sleep(0.01)
    await client._on_error(OSError("refused"))
    assert client.health.up is False
    client._connected.set()
    await asking
    assert client.health.up


@pytest.mark.parametrize(
    ("exc", "timeout_s", "words"),
    [
        (TimeoutError(), 2.0, "NATS does not answer within 2 s"),
        (TimeoutError(), 0.544, "NATS does not answer in time"),
        (ConnectionRefusedError(111, "Connection refused"), 2.0, "NATS: Connection refused"),
    ],
)
async def test_why_it_is_away(exc: Exception, timeout_s: float, words: str) -> None:
    client = Client(Settings(nats_url="nats://127.0.0.1"))
    client._connected.set()
    assert client._unavailable(exc, timeout_s, 0.0).detail == words
    assert text(TimeoutError()) == "no answer in time"
