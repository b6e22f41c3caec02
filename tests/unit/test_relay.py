"""Relay: what goes on to aiohttp, and what is known of the requests that did."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from datapipe.http.relay import Relay

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BAD = b"BREW / HTTP/1.1\r\n\r\n"


class Handler(asyncio.Protocol):
    """Takes what is passed on."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.got.append(data)

    @property
    def all(self) -> bytes:
        return b"".join(self.got)


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def relay(handler: Handler) -> Relay:
    return Relay(handler, cast(asyncio.Transport, None))


def test_idle_until_a_request_begins_and_again_once_all_are_answered(relay: Relay) -> None:
    assert (relay.idle, relay.in_head) == (True, True)  # for the first one
    relay.data_received(GET + HEAD)
    assert not relay.idle
    relay.answered(True)
    assert not relay.idle
    relay.data_received(b"{}")
    relay.answered(True)
    assert (relay.idle, relay.in_head) == (True, False)


def test_in_head_between_its_first_byte_and_its_last(relay: Relay) -> None:
    relay.data_received(HEAD[:1])
    assert (relay.idle, relay.in_head) == (True, True)
    relay.data_received(HEAD[1:])
    assert (relay.idle, relay.in_head) == (False, False)
    relay.data_received(b"{}" + GET[:5])
    assert not relay.in_head  # something else is under way
    relay.answered(True)
    assert relay.in_head


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_heads_are_passed_on_once_they_are_complete(
    relay: Relay, handler: Handler, size: int
) -> None:
    data = GET + HEAD + b"{}" + CHUNKED + b"2\r\n{}\r\n0\r\n\r\n" + GET
    for i in range(0, len(data), size):
        relay.data_received(data[i : i + size])
        passed = handler.all
        assert data.startswith(passed)
        assert passed in (GET, GET + HEAD + b"{}", data) or b"\r\n\r\n" not in data[len(passed) : i]
    assert handler.all == data


@pytest.mark.parametrize(
    "good", [GET, HEAD + b"{}", CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", CHUNKED + b"0\r\nA: b\r\n\r\n"]
)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_what_is_complete_before_a_malformed_head_is_passed_on(
    relay: Relay, handler: Handler, good: bytes, size: int
) -> None:
    data = good * 3 + BAD + GET
    for i in range(0, len(data), size):
        relay.data_received(data[i : i + size])
    assert handler.all == good * 3
    assert relay.refused is not None
    for _ in range(3):
        assert not relay.idle
        relay.answered(True)
    assert relay.idle  # so the refusal can be told


def test_a_malformed_body_is_the_refusal_of_its_request(relay: Relay, handler: Handler) -> None:
    relay.data_received(GET + CHUNKED + b"2\r\n{}\r\nx\r\n")
    assert handler.all == GET + CHUNKED
    assert (relay.refused is not None, relay.idle) == (True, False)
    relay.answered(True)
    assert relay.idle


def test_a_malformed_body_that_is_answered_has_no_second_answer(relay: Relay) -> None:
    relay.data_received(CHUNKED)
    relay.answered(True)
    relay.data_received(b"x\r\n")
    assert (relay.refused is not None, relay.idle) == (True, False)


def test_nothing_is_refused_behind_the_last_answer(relay: Relay) -> None:
    relay.data_received(GET + BAD)
    relay.answered(False)
    assert (relay.refused is not None, relay.idle) == (True, False)


def test_another_protocol_is_passed_on_as_it_is(relay: Relay, handler: Handler) -> None:
    upgrade = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for data in (upgrade, BAD, b"\0"):
        relay.data_received(data)
    assert handler.all == upgrade + BAD + b"\0"
    assert (relay.refused, relay.idle, relay.in_head) == (None, False, False)


def test_many_blank_lines_in_chunks_cost_little(relay: Relay, handler: Handler) -> None:
    """Each may be the end of the body."""
    relay.data_received(CHUNKED + b"100000\r\n")
    relay.data_received(b"\r\n\r\n" * 65_536)
    assert len(handler.got) == 2
