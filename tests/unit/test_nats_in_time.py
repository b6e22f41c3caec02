"""No copy of a segment is published once its append is over: see `prune`."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from unittest import mock

import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats import mirror as mirror_module
from datapipe.mirrors.nats.mirror import Nats
from datapipe.settings import Settings
from tests.mirror_nats import segment

TIMEOUT_S = 0.5


class Client:
    """Counts publishes; nobody answers them."""

    max_payload = 1 << 20

    def __init__(self) -> None:
        self.published = 0

    async def request(self, call: str, subject: str, payload: bytes, **more: Any) -> None:
        assert call == "publish"
        assert more["timeout_s"] > 0
        self.published += 1
        raise MirrorUnavailable("no answer")


class World:
    def __init__(self) -> None:
        self.client: Any = Client()
        settings = Settings(mirror="nats", nats_url="nats://h:1", mirror_timeout=TIMEOUT_S)
        self.mirror = Nats(self.client, settings, "one")
        self.ensures = mock.patch.object(self.mirror.streams, "ensure", self._ensure)
        self.ensure_s = 0.0

    async def _ensure(self, lane: str, *, again: bool = False) -> None:
        if self.ensure_s:
            await asyncio.sleep(self.ensure_s)

    async def append(self) -> tuple[float, int]:
        """Seconds that it took, and how often it was published."""
        began = time.monotonic()
        with self.ensures:
            appended = await self.mirror.append([segment(1)])
        assert isinstance(appended.error, MirrorUnavailable)
        assert not appended.stored
        return time.monotonic() - began, self.client.published


@pytest.fixture
def world() -> World:
    return World()


async def test_it_is_repeated_until_then(world: World) -> None:
    took_s, published = await world.append()
    assert took_s < TIMEOUT_S + 0.3
    assert published > 1


async def test_a_stream_that_is_long_in_the_making_ends_it_in_time(world: World) -> None:
    world.ensure_s = 10.0
    took_s, published = await world.append()
    assert TIMEOUT_S <= took_s < TIMEOUT_S + 0.5
    assert published == 0


async def test_a_process_that_slept_publishes_nothing_when_it_wakes(world: World) -> None:
    """Between two tries; it was frozen, or its machine was."""
    with mock.patch.object(mirror_module, "backoff", return_value=0.05):
        asyncio.get_running_loop().call_later(0.02, time.sleep, 2 * TIMEOUT_S)
        took_s, published = await world.append()
    assert took_s > 2 * TIMEOUT_S
    assert published == 1  # the one before


async def test_the_next_ones_are_refused_at_once_for_a_while(world: World) -> None:
    await world.append()
    assert "install" in world.mirror.full(["install", "purchase"])
    assert "purchase" not in world.mirror.full(["install", "purchase"])
    with mock.patch.object(
        mirror_module.time, "monotonic", return_value=time.monotonic() + mirror_module._IN_VAIN_S
    ):
        assert not world.mirror.full(["install"])
