"""What is in hand is held, and leaves nothing behind when it is removed."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
from structlog.testing import capture_logs

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats import hand as hand_module
from datapipe.mirrors.nats.hand import Hand
from datapipe.mirrors.nats.pull import Delivery
from datapipe.mirrors.nats.streams import Streams
from datapipe.settings import Settings
from tests.mirror_nats import segment


class Client:
    """Raises `fails` if it is set, for as often as it says; else counts who was asked."""

    def __init__(self) -> None:
        self.fails: list[Exception] = []
        self.asked: list[str] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def publish(self, call: str, subject: str, payload: bytes = b"", reply: str = "") -> None:
        await self.request(call, subject)

    async def request(self, call: str, subject: str, payload: bytes = b"") -> None:
        await self.answers.wait()
        if self.fails:
            raise self.fails.pop(0)
        self.asked.append(f"{call} {subject}")


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def hand(client: Client) -> Hand:
    untyped: Any = client
    settings = Settings(mirror="nats", nats_url="nats://h:1", database_url="postgresql://h/d")
    return Hand(untyped, Streams(untyped, settings))


async def test_a_removal_that_dies_leaves_nothing_behind(hand: Hand, client: Client) -> None:
    """What is redelivered then must be taken anew, and not be thought to be on its way out."""
    segments = [segment(number) for number in range(100)]
    for number, each in enumerate(segments):
        assert hand.receive(each, Delivery("", f"r{number}", None, each.data, 0.0))
    client.fails = [RuntimeError("unforeseen")]
    with capture_logs() as logs:
        removal = hand.remove(segments)
        assert len(hand.removing) == 100
        with pytest.raises(RuntimeError):
            await removal
        await asyncio.sleep(0)
    assert (hand.removing, hand.held) == ({}, {})
    assert [line["task"] for line in logs if line["log_level"] == "critical"] == [
        "acknowledgements"
    ]
    assert hand.receive(segments[0], Delivery("", "r", None, b"", 0.0))


async def test_a_removal_that_is_cancelled_leaves_nothing_behind(
    hand: Hand, client: Client
) -> None:
    taken = segment(1)
    hand.receive(taken, Delivery("", "r", None, b"", 0.0))
    client.answers.clear()
    removal = hand.remove([taken])
    await asyncio.sleep(0)
    removal.cancel()
    await asyncio.wait([removal])
    assert not hand.removing


async def test_holding_goes_on_whatever_happens(hand: Hand, client: Client) -> None:
    for number in range(3):
        hand.receive(segment(number), Delivery("", f"r{number}", None, b"", 0.0))
    client.fails = [MirrorUnavailable("the others are told all the same"), RuntimeError("what?")]
    with mock.patch.object(hand_module, "ACK_WAIT_S", 0.03), capture_logs() as logs:
        holding = asyncio.create_task(hand.hold())
        async with asyncio.timeout(5):
            while len(client.asked) < 3:
                await asyncio.sleep(0.01)
        holding.cancel()
        await asyncio.wait([holding])
    assert client.asked[:3] == ["hold r0", "hold r1", "hold r2"]
    critical = [line for line in logs if line["log_level"] == "critical"]
    assert [(line["event"], line["task"]) for line in critical] == [
        ("background task died", "hold")
    ]
    assert holding.cancelled()
