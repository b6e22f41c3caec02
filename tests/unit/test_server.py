"""One connection, step by step: what it holds, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest

from datapipe.http import responses
from datapipe.http.heads import Heads
from datapipe.http.responses import Answer
from datapipe.http.server import Connection, Server
from tests.wire import post

BODY = b'{"event_name": "install"}'
TIMEOUT_S = 20.0


class Transport(asyncio.Transport):
    """Keeps what is written; closes when it is read, which is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.closing = self.aborted = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        class Socket:
            def setsockopt(self, *_: object) -> None: ...

        return Socket()

    def write(self, data: Any) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True


class Handler:
    """Answers at once, or when the test says so."""

    def __init__(self) -> None:
        self.observe: Callable[[float], None] = lambda _: None
        self.waiting: list[Callable[[Answer], None]] = []
        self.at_once = True

    def take(self, headers: Any, key: Any, body: Any, id: str, send: Any) -> bool:
        if self.at_once:
            send(responses.OK)
        else:
            self.waiting.append(send)
        return True

    async def answer(self, *_: Any) -> Answer:
        raise RuntimeError("not foreseen")


class Idle(asyncio.Protocol):
    """A handler of aiohttp's that says nothing."""


class World:
    def __init__(self) -> None:
        self.handler = Handler()
        fallback: Any = Idle
        self.server = Server(self.handler, fallback, Heads(), TIMEOUT_S)
        self.transport = Transport()
        self.connection: Connection = self.server()
        self.connection.connection_made(self.transport)


@pytest.fixture
async def world() -> World:
    return World()


async def test_a_client_that_does_not_read_is_not_read_either(world: World) -> None:
    world.connection.pause_writing()
    while world.transport.reading:
        world.connection.data_received(post(BODY) * 100)
        assert len(world.connection._received) < 100_000
    world.connection.resume_writing()
    for _ in range(3000):
        await asyncio.sleep(0)
    assert world.transport.reading
    assert world.transport.written.count(b"HTTP/1.1 200") > 300


async def test_a_connection_at_rest_holds_nothing(world: World) -> None:
    world.connection.data_received(post(b" " * 50_000 + BODY))
    assert b" 200 " in world.transport.written
    assert world.connection._received == b""


async def test_what_is_never_read_does_not_hold_a_connection_open_for_ever(world: World) -> None:
    world.connection.data_received(b"nonsense\r\n\r\n")
    assert b" 400 " in world.transport.written
    now = perf_counter()
    world.connection.end_if_late(now)
    assert (world.transport.closing, world.transport.aborted) == (True, False)
    world.connection.end_if_late(now + 10)
    assert world.transport.aborted


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"\r\n\r\n", b"POST /", b"GET /x HTTP/1.1\r\nA:"])
async def test_a_head_has_its_time(world: World, begun: bytes) -> None:
    if begun:
        world.connection.data_received(begun)
    world.connection.end_if_late(perf_counter() + TIMEOUT_S - 1)
    assert not world.transport.closing
    world.connection.end_if_late(perf_counter() + TIMEOUT_S + 1)
    assert world.transport.closing
    assert b" 408 " in world.transport.written


async def test_a_head_that_is_handed_over_halfway_gets_no_more_time(world: World) -> None:
    world.connection._deadline -= 15
    world.connection.data_received(b"GET /" + b"x" * 9000)
    world.connection.end_if_late(perf_counter() + 6)
    assert b" 408 " in world.transport.written


async def test_an_error_of_ours_is_an_answer(world: World) -> None:
    world.handler.take = lambda *_: False  # type: ignore[method-assign]
    world.connection.data_received(post(BODY))
    for _ in range(5):
        await asyncio.sleep(0)
    assert b" 500 " in world.transport.written
    assert world.connection.end()
