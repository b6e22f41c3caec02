"""Heads: what is plain, what is refused, what is remembered."""

from __future__ import annotations

import pytest

from datapipe.errors import Refused
from datapipe.http import heads
from datapipe.http.heads import Heads, Syntax


def head(*lines: str, first: str = "POST / HTTP/1.1") -> bytes:
    return "\r\n".join([first, "Host: x", *lines, "", ""]).encode("latin-1")


PLAIN = head("Content-Length: 5", "X-A: b")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The heads that were parsed, not looked up."""
    found: list[bytes] = []
    parse = heads._parse

    def counted(data: bytes) -> heads.Head | None:
        found.append(data)
        return parse(data)

    monkeypatch.setattr(heads, "_parse", counted)
    return found


def test_it_is_noted_once_whether_a_head_asks_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = Heads(), head("Content-Length: 5", "Prefer: wait=3")
    for _ in range(3):
        found, plain = known.read(asked), known.read(head("X-A: b", "Prefer: wait=x"))
        assert found is not None and plain is not None  # noqa: PT018
        assert (found.waits, plain.waits) == (True, False)
    monkeypatch.setattr(heads, "wait_seconds", None)  # looked up from now on
    assert known.read(asked) is found


def test_a_plain_head() -> None:
    found = Heads().read(
        head("Content-Length: 5", "X-A:  b ", first="POST /?a=b&key=s%20p HTTP/1.1")
    )
    assert found is not None
    assert (found.length, found.credentials.in_query) == (5, "s p")
    assert dict(found.headers) == {"Host": "x", "Content-Length": "5", "X-A": "b"}


@pytest.mark.parametrize(
    "data",
    [head(first="GET / HTTP/1.1"), head(first="POST /x HTTP/1.1"), head(first="POST / HTTP/1.0"),
     head(first="POST /?a#b HTTP/1.1"), head(first="POST http://x/ HTTP/1.1"),
     head("Transfer-Encoding: chunked"), head("Expect: 100-continue"), head("Upgrade: h2c"),
     head("Connection: close"), head("Proxy-Connection: close"), head("X-A: b", "X-A: c"),
     head("X-A: b\tc"), head("X-A: \xe9"), head(*[f"X-{i}: {'a' * 1000}" for i in range(9)]),
     b"\r\n" + PLAIN],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_aiohttp(data: bytes) -> None:
    assert Heads().read(data) is None


@pytest.mark.parametrize(
    "data",
    [head("Content-Length: 5", "Content-Length: 5"), head("Content-Length: 5, 5"),
     head("Content-Length: +5"), head("Content-Length: 0x5"), head("Content-Length:"),
     head("Content-Length: 5", "Transfer-Encoding: chunked"), head("Transfer-Encoding: gzip"),
     head("Content-Length: 9999999999999999999"), head("Host: y"), head("Expect: x"),
     head("X-A: b\r\n c"), head("X-A: \0"), head("X A: b"), head("X-A : b"), head("X-A"),
     head(first="POST / HTTP/2.0"), head(first="POST * HTTP/1.1"),
     head(first="CONNECT a:1 HTTP/1.1"), head(first="POST http:/// HTTP/1.1"),
     head(first="post / HTTP/1.1"), head("Sec-WebSocket-Key1: x"), head(*["X: y"] * 128),
     head("X-A: " + "a" * 8191),
     head(*[f"X-{i}: {'a' * 1000}" for i in range(66)]), b"POST / HTTP/1.1\r\n\r\n",
     PLAIN.replace(b"\r\n", b"\n")],
)  # fmt: skip
def test_what_is_malformed_is_refused(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        Heads().read(data)
    assert caught.value.status == 400
    assert len(caught.value.detail) <= 200


def test_a_head_is_remembered_from_the_second_sight_on(parsed: list[bytes]) -> None:
    known = Heads()
    first, second = known.read(PLAIN), known.read(PLAIN)
    assert first is not second
    assert len(parsed) == 2
    assert known.read(PLAIN) is second
    known.forget()
    assert known.read(PLAIN) is not second
    assert len(parsed) == 3


def test_what_differs_from_request_to_request_does_not_stand_in_the_way(
    parsed: list[bytes],
) -> None:
    known = Heads()
    for i in range(10):
        traced = (f"Traceparent: 00-{i}", f"tracestate: t={i}")
        found = known.read(head(f"Idempotency-Key: k{i}", f"x-request-id: r{i}", "X-A: b", *traced))
        assert found is not None
        assert (found.headers["traceparent"], found.headers["tracestate"]) == (f"00-{i}", f"t={i}")
        assert (found.headers["idempotency-key"], found.headers["X-Request-ID"]) == (
            f"k{i}", f"r{i}",
        )  # fmt: skip
    assert len(parsed) == 2
    assert known.read(head("Idempotency-Key: a", "Idempotency-Key: b")) is None
    assert known.read(head("Idempotency-Key: a", "idempotency-key: b")) is None


def test_what_is_malformed_or_not_plain_is_not_remembered(parsed: list[bytes]) -> None:
    known = Heads()
    for _ in range(3):
        assert known.read(head(first="GET / HTTP/1.1")) is None
        with pytest.raises(Refused):
            known.read(head("X A: b"))
    assert len(parsed) == 6


@pytest.mark.parametrize("length", [10, 5000])
def test_what_is_remembered_is_bounded_in_number_and_bytes(length: int) -> None:
    known = Heads()
    for i in range(3 * heads._SEEN_ONCE):
        data = head(f"X-{i}: {'a' * length}")
        known.read(data)
        if i % 3 == 0:
            known.read(data)
        assert len(known._known) <= heads._REMEMBERED
        assert sum(map(len, known._known)) <= heads._REMEMBERED_BYTES
        assert len(known._seen) <= heads._SEEN_ONCE
    data = head("X-A: again")
    assert known.read(data) is not known.read(data)
    assert known.read(data) is known.read(data)  # it still remembers


def test_syntax_follows_requests_that_come_in_pieces() -> None:
    syntax, data = Syntax(), PLAIN + b"12345" + head("Transfer-Encoding: chunked") + b"1\r\nx\r\n"
    seen = []
    for i in range(len(data)):
        assert syntax.feed(data[i : i + 1])
        seen.append((syntax.heads, syntax.in_head, syntax.in_body, syntax.length))
    assert list(dict.fromkeys(seen)) == [
        (0, True, False, 0), (1, False, True, 5), (1, False, False, 5), (1, True, False, 5),
        (2, False, True, 0),
    ]  # fmt: skip
