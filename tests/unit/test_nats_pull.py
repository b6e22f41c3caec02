"""How a pull ends: when as many messages are here as the server says that it sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import pytest
from nats.aio.msg import Msg

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors.nats import pull as pull_module
from datapipe.mirrors.nats.client import NoResponders
from datapipe.mirrors.nats.pull import Puller
from datapipe.mirrors.nats.streams import Stream

LANE = Stream("install", "t_install")


class Client:
    """Calls `act` for each request; what it is told to `send` arrives later, in that order."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.act: Callable[[], None] = lambda: None
        self._heard: Callable[[Msg], Awaitable[None]] | None = None
        self._inbox = ""
        self._sending: set[asyncio.Task[None]] = set()

    def new_inbox(self) -> str:
        return "inbox"

    async def subscribe(self, subject: str, heard: Callable[[Msg], Awaitable[None]]) -> None:
        self._heard = heard

    async def publish(self, call: str, subject: str, payload: bytes, reply: str) -> None:
        assert subject == "$JS.API.CONSUMER.MSG.NEXT.t_install.load"
        self.requests.append(json.loads(payload))
        self._inbox = reply
        self.act()

    def send(self, *what: int | tuple[str, int | None]) -> None:
        """A message with this sequence; or a status, and how many were not sent."""
        task = asyncio.create_task(self._send(self._inbox, what))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, inbox: str, what: tuple[int | tuple[str, int | None], ...]) -> None:
        assert self._heard is not None
        for each in what:
            await asyncio.sleep(0)
            if isinstance(each, int):
                reply = f"$JS.ACK.t_install.load.1.{each}.{each}.1700000000000000000.0"
                await self._heard(_message("t.install.1", reply, b"data", None))
            else:
                status, left = each
                headers = {"Status": status}
                if left is not None:
                    headers["Nats-Pending-Messages"] = str(left)
                await self._heard(_message(inbox, "", b"", headers))


def _message(subject: str, reply: str, data: bytes, headers: dict[str, str] | None) -> Msg:
    client: Any = None
    return Msg(client, subject, reply, data, headers)


class World:
    def __init__(self) -> None:
        self.client = Client()
        untyped: Any = self.client
        self.puller = Puller(untyped, "t")

    async def pull(self, batch: int = 10) -> list[int]:
        found = await asyncio.wait_for(self.puller.pull(LANE, batch, 1000), 5)
        return [each.position for each in found]


@pytest.fixture
def world() -> World:
    return World()


async def test_a_full_batch_needs_no_status(world: World) -> None:
    world.client.act = lambda: world.client.send(1, 2, 3)
    assert await world.pull(3) == [1, 2, 3]


async def test_a_status_ends_it(world: World) -> None:
    world.client.act = lambda: world.client.send(1, 2, ("404", 8))
    assert await world.pull() == [1, 2]
    world.client.act = lambda: world.client.send(("404", 10))
    assert await world.pull() == []


async def test_a_status_that_overtakes_its_messages_does_not_lose_them(world: World) -> None:
    world.client.act = lambda: world.client.send(("409", 7), 1, 2, 3)
    assert await world.pull() == [1, 2, 3]


async def test_what_comes_too_late_is_taken_next(world: World) -> None:
    with mock.patch.object(pull_module, "ANSWER_S", 0.05):
        world.client.act = lambda: world.client.send(1)
        assert await world.pull() == [1]  # no more came, and no status
        world.client.send(2, 3)
        await asyncio.sleep(0.02)
        before = len(world.client.requests)
        assert await world.pull() == [2, 3]
        assert len(world.client.requests) == before


async def test_what_lay_here_for_too_long_is_left_to_others(world: World) -> None:
    with mock.patch.object(pull_module, "ANSWER_S", 0.05):
        world.client.act = lambda: world.client.send(1)
        await world.pull()
        world.client.send(2)
        await asyncio.sleep(0.02)
        world.client.act = lambda: world.client.send(3, ("404", 9))
        with mock.patch.object(pull_module, "_STALE_S", 0.0):
            assert await world.pull() == [3]


async def test_a_status_of_an_earlier_pull_ends_no_later_one(world: World) -> None:
    with mock.patch.object(pull_module, "ANSWER_S", 0.05):
        late = ("404", 9)
        with pytest.raises(MirrorUnavailable):
            await world.pull()
        first = world.client._inbox
        world.client.act = lambda: world.client.send(1, 2, ("404", 8))
        pulling = asyncio.create_task(world.pull())
        await asyncio.sleep(0)
        await world.client._send(first, (late,))
        assert await pulling == [1, 2]


async def test_one_that_is_larger_than_the_bound_is_fetched_alone(world: World) -> None:
    answers = iter([[("409", 10)], [1]])
    world.client.act = lambda: world.client.send(*next(answers))  # type: ignore[arg-type]
    assert await world.pull() == [1]
    assert [("max_bytes" in each, each["batch"]) for each in world.client.requests] == [
        (True, 10),
        (False, 1),
    ]


async def test_a_status_without_a_count_ends_it_with_what_is_here(world: World) -> None:
    world.client.act = lambda: world.client.send(1, ("409", None))
    assert await world.pull() == [1]


async def test_nobody_there_and_no_answer_are_told_apart(world: World) -> None:
    world.client.act = lambda: world.client.send(("503", None))
    with pytest.raises(NoResponders):
        await world.pull()
    world.client.act = lambda: None
    with mock.patch.object(pull_module, "ANSWER_S", 0.05), pytest.raises(MirrorUnavailable):
        await world.pull()


async def test_what_came_before_a_cancellation_is_taken_next(world: World) -> None:
    world.client.act = lambda: world.client.send(1)
    pulling = asyncio.create_task(world.pull())
    await asyncio.sleep(0.02)
    pulling.cancel()
    await asyncio.wait([pulling])
    assert await world.pull() == [1]


async def test_what_came_late_for_a_lane_that_is_not_pulled_any_more_is_forgotten(
    world: World,
) -> None:
    with mock.patch.object(pull_module, "ANSWER_S", 0.05):
        world.client.act = lambda: world.client.send(1)
        await world.pull()
        world.client.send(2)
        await asyncio.sleep(0.02)
        world.puller.forget_late()
        assert [each.position for each in world.puller._late["install"]] == [2]  # still ours
        with mock.patch.object(pull_module, "_STALE_S", 0.0):
            world.puller.forget_late()
        assert not world.puller._late
