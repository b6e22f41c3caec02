"""The two ways in answer the same bytes alike: see `tests.ways`.

What one way reads otherwise than the other could be smuggled past a proxy, or past a check. Each
case says what it is answered, so that both can't be wrong together; `x`: then the end.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import structlog
import uvloop

from datapipe.http import server
from tests.ways import LINGER_S, Step, Talk, Way, both_ways
from tests.wire import crash, get, post, purchase

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
SHOP = "https://shop.example"
SETTINGS: dict[str, dict[str, Any]] = {
    # answers come after what is sent in one go, so that there is something ahead
    "open": {"body_max_len": 150_000, "request_timeout": 1, "mirror_linger_ms": 5},
    "locked": {"ingest_keys": ["key", "s p+/"], "cors_origins": [SHOP]},
    "everybody": {"cors_origins": ["*"]},
    "full": {"mirror": "none", "buffer_max_bytes": 0},
    "small": {"input_max_len": 64, "batch_max_events": 3},
    "broken": {},
    "stopping": {},
}
J = json.dumps(crash()).encode()
TWO = json.dumps([crash(), purchase()]).encode()
LINES = b"\n".join([J, b"{", json.dumps(purchase()).encode(), b"{}"])
CHUNKED = "Transfer-Encoding: chunked"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = f"00-{TRACE}-{SPAN}-01"
LATE = 1.15  # seconds: past `request_timeout`, while the connection lingers


class Ways:
    """Both services of each kind of settings, made when they are first wanted, in one loop."""

    def __init__(self, folder: Any, make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._folder = folder
        self._runner = asyncio.Runner(loop_factory=make_loop)
        self._stack = AsyncExitStack()
        self._made: dict[str, dict[str, Way]] = {}

    async def made(self, kind: str) -> dict[str, Way]:
        if kind not in self._made:
            opening = both_ways(self._folder / kind, **SETTINGS[kind])
            self._made[kind] = await self._stack.enter_async_context(opening)
            for way in self._made[kind].values():
                if kind == "broken":
                    way.pipeline.ingest._parser.single = _fail  # type: ignore[method-assign]
                way.pipeline.buffer.stopping = kind == "stopping"
        return self._made[kind]

    def talk(self, kind: str, *steps: Step, probe: bool = True) -> dict[str, Talk]:
        """What each way makes of it."""

        async def talk() -> dict[str, Talk]:
            ways = await self.made(kind)
            talks = [way.talk(steps, probe=probe) for way in ways.values()]
            return dict(zip(ways, await asyncio.gather(*talks), strict=True))

        return self._runner.run(talk())

    def of(self, kind: str) -> dict[str, Way]:
        """Those that have talked."""
        return self._made[kind]

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()


def _fail(*_: object) -> None:
    raise RuntimeError("an error of ours")


@pytest.fixture(scope="module", params=LOOPS)
def ways(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ways]:
    with mock.patch.object(server, "_LINGER_S", LINGER_S):
        ways = Ways(tmp_path_factory.mktemp("ways"), LOOPS[request.param])
        yield ways
        ways.close()


@contextmanager
def faults() -> Iterator[list[Any]]:
    """The internal errors that are logged meanwhile."""
    with structlog.testing.capture_logs() as logged:
        found: list[Any] = []
        yield found
        found += [line for line in logged if line["event"] == "fault"]


def raw(*lines: str | bytes, body: bytes = b"") -> bytes:
    """A request of these lines, as they are."""
    return b"\r\n".join([x.encode("latin-1") if isinstance(x, str) else x for x in lines]) + (
        b"\r\n\r\n" + body
    )


def line(first: str, *headers: str | bytes) -> bytes:
    """A request of this first line with a good body."""
    return raw(first, "Host: localhost", f"Content-Length: {len(J)}", *headers, body=J)


def each(data: bytes) -> list[Step]:
    """Byte by byte."""
    return [data[i : i + 1] for i in range(len(data))]


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def lengths(*values: str) -> bytes:
    return post(J, *(f"Content-Length: {value}" for value in values))


def basic(user: str, password: str) -> str:
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


N = len(J)
OK_THEN_END = "200 400 x"
# name -> steps, what they are answered
FRAMING: dict[str, tuple[list[Step], str]] = {
    "plain": ([post(J)], "200"),
    "the same, again and again": ([post(J)] * 5, "200 200 200 200 200"),
    "two lengths, equal": ([lengths(str(N), str(N))], "400 x"),
    "two lengths, unequal": ([lengths(str(N), "0")], "400 x"),
    "two lengths in one header": ([lengths(f"{N}, {N}")], "400 x"),
    "two lengths, in two cases": ([post(J, f"Content-Length: {N}", "content-length: 0")], "400 x"),
    "length and chunks": ([post(chunks(J), "Content-Length: 5", CHUNKED)], "400 x"),
    "chunks and length": ([post(chunks(J), CHUNKED, "Content-Length: 5")], "400 x"),
    "no length": ([raw("POST / HTTP/1.1", "Host: x")], "400"),
    "no length, and a body": ([raw("POST / HTTP/1.1", "Host: x", body=J)], "400 400 x"),
    "length 0": ([post(b"")], "400"),
    "an empty length": ([lengths("")], "400 x"),
    "a length of blanks": ([lengths("  ")], "400 x"),
    "+79": ([lengths(f"+{N}")], "400 x"),
    "-1": ([lengths("-1")], "400 x"),
    "0x4f": ([lengths(f"0x{N:x}")], "400 x"),
    "7_9": ([lengths("7_9")], "400 x"),
    "7 9": ([lengths("7 9")], "400 x"),
    "79.0": ([lengths(f"{N}.0")], "400 x"),
    "079": ([lengths(f"0{N}")], "200"),
    "a length between blanks": ([lengths(f"  {N}  ")], "200"),
    "a length between tabs": ([lengths(f"\t{N}\t")], "200"),
    "a length in Arabic digits": ([lengths("\u0667\u0669")], "400 x"),
    "a blank before the colon": ([post(J, f"Content-Length : {N}")], "400 x"),
    "2**63": ([lengths(str(2**63))], "400 x"),
    "2**64 - 1": ([lengths(str(2**64 - 1))], "400 x"),
    "2**64": ([lengths(str(2**64))], "400 x"),
    "2**64 + 79": ([lengths(str(2**64 + N))], "400 x"),
    "chunks": ([post(chunks(J), CHUNKED)], "200"),
    "chunks of one byte": ([post(chunks(*each(J)), CHUNKED)], "200"),  # type: ignore[arg-type]
    "chunks, in one-byte pieces": (each(post(chunks(J[:9], J[9:]), CHUNKED)), "200"),
    "chunks with extensions": (
        [post(b'%x;a=b;c="d"\r\n%b\r\n0;e\r\n\r\n' % (N, J), CHUNKED)], "200",
    ),
    "chunks with trailers": ([post(chunks(J)[:-2] + b"A: b\r\nC: d\r\n\r\n", CHUNKED)], "200"),
    "a trailer that is a Host": ([post(chunks(J)[:-2] + b"Host: y\r\n\r\n", CHUNKED)], "400 x"),
    "a trailer that is a length": (
        [post(chunks(J)[:-2] + b"Content-Length: 5\r\n\r\n", CHUNKED)], "400 x",
    ),
    "chunks, a bare LF in a size": ([post(b"%x\n%b\r\n0\r\n\r\n" % (N, J), CHUNKED)], "400 x"),
    "chunks, a size too small": ([post(b"%x\r\n%b\r\n0\r\n\r\n" % (N - 1, J), CHUNKED)], "400 x"),
    "chunks, no size": ([post(b"\r\n" + J, CHUNKED)], "400 x"),
    "chunks, 0x": ([post(b"0x%x\r\n%b\r\n0\r\n\r\n" % (N, J), CHUNKED)], "400 x"),
    "chunks, a size beyond 64 bits": ([post(b"1%016x\r\n%b\r\n" % (N, J), CHUNKED)], "400 x"),
    "chunked twice": ([post(chunks(J), "Transfer-Encoding: chunked, chunked")], "400 x"),
    "chunked twice, two headers": ([post(chunks(J), CHUNKED, CHUNKED)], "400 x"),
    "gzip, chunked": ([post(chunks(J), "Transfer-Encoding: gzip, chunked")], "400 x"),
    "chunked, gzip": ([post(chunks(J), "Transfer-Encoding: chunked, gzip")], "400 x"),
    "identity": ([post(J, "Transfer-Encoding: identity", f"Content-Length: {N}")], "400 x"),
    "CHUNKED": ([post(chunks(J), "transfer-encoding: CHUNKED")], "200"),
    "xchunked": ([post(chunks(J), "Transfer-Encoding: xchunked")], "400 x"),
    "chunked;q=1": ([post(chunks(J), "Transfer-Encoding: chunked;q=1")], "400 x"),
    "chunked behind a tab": ([post(chunks(J), "Transfer-Encoding:\tchunked")], "200"),
    "chunked, an empty element": ([post(chunks(J), "Transfer-Encoding: ,chunked")], "400 x"),
    "chunked, folded": ([post(chunks(J), "Transfer-Encoding:\r\n chunked")], "400 x"),
    "a body in one-byte pieces": ([post(J)[:-N], *each(J)], "200"),
    "a head in one-byte pieces": ([*each(post(J)[:-N]), J], "200"),
    "all in one-byte pieces": (each(post(J) * 2), "200 200"),
    "head and body apart": ([post(J)[:-N], J], "200"),
    "bytes behind the body": ([post(J) + b"}"], OK_THEN_END),
    "a CR LF behind the body": ([post(J) + b"\r\n" + post(J)], "200 200"),
    "CR LFs behind the body": ([post(J) + b"\r\n\r\n\r\n" + post(J)], "200 200"),
    "leading CR LFs": ([b"\r\n\r\n" + post(J)], "200"),
    "a leading CR LF of its own": ([b"\r\n", post(J)], "200"),
    "a leading LF": ([b"\n" + post(J)], "200"),
    "a leading blank": ([b" " + post(J)], "400 x"),
    "a request inside the body": ([post(post(J))], "207"),
    "a body longer than said": ([post(J + J, f"Content-Length: {N}")], OK_THEN_END),
    "a body shorter than said": ([lengths(str(N + 7)) + post(J)], "400 400 x"),
    "a blank line in the body": ([post(J + b"\r\n\r\n" + J)], "200"),
    "long, all at once": ([post(J.ljust(140_000)) + post(J)], "200 200"),
    "long, in two pieces": ([post(J.ljust(140_000))[:70_000], post(J.ljust(140_000))[70_000:]],
                            "200"),
    "long ones ahead, whole": ([post(J), post(J.ljust(100_000))], "200 200"),
    "long ones ahead, in pieces": (
        [post(J), post(J.ljust(140_000))[:90_000], post(J.ljust(140_000))[90_000:], post(J)],
        "200 200 200",
    ),
    "a hundred": ([post(J) * 100], " ".join(["200"] * 100)),
    "a hundred, apart": ([post(J)] * 100, " ".join(["200"] * 100)),
    "a hundred over mixed paths": (
        [(post(J) + get("/healthz") + post(b"{") + get("/nope") + post(TWO)) * 20],
        " ".join(["200 200 400 404 200"] * 20),
    ),
    "two hundred, other headers each": (
        [b"".join(post(J, f"X-Request-ID: r{i}", f"X-N: {i % 7}") for i in range(200))],
        " ".join(["200"] * 200),
    ),
    "good ones, then malformed": ([post(J) * 3 + b"BREW / HTTP/1.1\r\n\r\n"], "200 200 200 400 x"),
    "good ones of aiohttp's, then malformed": (
        [get("/healthz") + post(J) * 2 + b"BREW / HTTP/1.1\r\n\r\n" + post(J)], "200 200 200 400 x",
    ),
    "chunks, then malformed": (
        [post(chunks(J), CHUNKED) * 2 + post(b"0x1\r\n", CHUNKED)], "200 200 400 x",
    ),
    "chunks in pieces, then malformed": (
        [post(chunks(J), CHUNKED)[:-20], chunks(J)[-20:] + b"BREW / HTTP/1.1\r\n\r\n"],
        OK_THEN_END,
    ),
    "a body in pieces, then malformed": (
        [get("/nope") + post(J)[:-5], J[-5:] + b"BREW / HTTP/1.1\r\n\r\n"], "404 200 400 x",
    ),
    "malformed, then good": ([b"BREW / HTTP/1.1\r\n\r\n" + post(J)], "400 x"),
    "malformed as far as it is here": ([b"POST / HTTP/1.1\r\nHost localhost\r\n"], "400 x"),
}  # fmt: skip

HEADS: dict[str, tuple[list[Step], str]] = {
    "obs-fold": ([post(J, "X-A: b\r\n c")], "400 x"),
    "obs-fold behind an empty value": ([post(J, "X-A:\r\n b")], "400 x"),
    "obs-fold of the length": ([lengths(f"\r\n {N}")], "400 x"),
    "obs-fold of the first header": ([raw("POST / HTTP/1.1", " Host: x", body=J)], "400 x"),
    "bare LF everywhere": ([post(J).replace(b"\r\n", b"\n")], "400 x"),
    "a bare LF behind the request line": ([post(J).replace(b"\r\n", b"\n", 1)], "400 x"),
    "a bare LF behind a header": ([post(J, "X-A: b\nX-C: d")], "400 x"),
    "a bare LF at the end of the head": ([post(J).replace(b"\r\n\r\n", b"\r\n\n")], "400 x"),
    "LF LF": ([post(J).replace(b"\r\n\r\n", b"\n\n")], "400 x"),
    "a bare CR in a value": ([post(J, "X-A: b\rX-C: d")], "400 x"),
    "a bare CR behind a header": ([post(J).replace(b"\r\n\r\n", b"\r\r\n\r\n")], "400 x"),
    "CR CR LF": ([post(J, "X-A: b\r")], "400 x"),
    "NUL in a value": ([post(J, "X-A: b\0c")], "400 x"),
    "NUL in a name": ([post(J, "X-\0A: b")], "400 x"),
    "NUL in the target": ([line("POST /\0 HTTP/1.1")], "400 x"),
    "a control character in a value": ([post(J, "X-A: b\x01c")], "400 x"),
    "DEL in a value": ([post(J, "X-A: b\x7fc")], "400 x"),
    "high bytes in a value": ([line("POST / HTTP/1.1", b"X-A: \xff\x80")], "200"),
    "high bytes in a name": ([line("POST / HTTP/1.1", b"X-\xff: a")], "400 x"),
    "high bytes in the target": ([line("POST /?\xff HTTP/1.1")], "400 x"),
    "high bytes in the host": ([raw("POST / HTTP/1.1", b"Host: \xff", "Content-Length: 0")], "400"),
    "a tab in a value": ([post(J, "X-A: b\tc")], "200"),
    "tabs and blanks around values": ([post(J, "X-A: \t b \t", "X-B:\tc\t")], "200"),
    "blanks behind values": ([post(J, "X-Request-ID: abc   ", "Idempotency-Key: k1  ")], "200"),
    "no blank behind the colon": ([post(J, "X-Request-ID:abc", "Idempotency-Key:k2")], "200"),
    "an empty value": ([post(J, "X-A:", "X-Request-ID:")], "200"),
    "an empty name": ([post(J, ": a")], "400 x"),
    "no colon": ([post(J, "X-A")], "400 x"),
    "a name with a blank": ([post(J, "X A: b")], "400 x"),
    "a name with brackets": ([post(J, "X(A): b")], "400 x"),
    "a name in quotes": ([post(J, '"X": b')], "400 x"),
    "an underscore": ([post(J, "Content_Length: 5")], "200"),
    "names in odd cases": ([raw("POST / HTTP/1.1", "hOST: x", f"cONTENT-lENGTH: {N}", body=J)],
                           "200"),
    "a header twice": ([post(J, "X-A: b", "X-A: c")], "200"),
    "no Host": ([raw("POST / HTTP/1.1", f"Content-Length: {N}", body=J)], "400 x"),
    "an empty Host": ([raw("POST / HTTP/1.1", "Host:", f"Content-Length: {N}", body=J)], "200"),
    "two Hosts": ([post(J, "Host: other")], "400 x"),
    "an odd Host": ([raw("POST / HTTP/1.1", "Host: a b[::", f"Content-Length: {N}", body=J)],
                    "200"),
    "128 headers": ([post(J, *(f"X-{i}: {i}" for i in range(126)))], "200"),
    "129 headers": ([post(J, *(f"X-{i}: {i}" for i in range(127)))], "400 x"),
    "1,000 headers": ([post(J, *(f"X-{i}: {i}" for i in range(1000)))], "400 x"),
    "1,000 headers on end": ([b"POST / HTTP/1.1\r\n" + b"A: b\r\n" * 1000], "400 x"),
    "a head of 8 KB": ([post(J, "X-A: " + "a" * 8000) * 2], "200 200"),
    "a head over 8 KB": ([post(J, *(f"X-{i}: " + "a" * 1000 for i in range(9))) * 2], "200 200"),
    "a line of 8,190 bytes": ([post(J, "X-A: " + "a" * 8190)], "200"),
    "a line of 8,191 bytes": ([post(J, "X-A: " + "a" * 8191)], "400 x"),
    "a target of 8,190 bytes": ([post(J, target="/?" + "a" * 8188)], "200"),
    "a target of 8,191 bytes": ([post(J, target="/?" + "a" * 8189)], "400 x"),
    "64 KiB of head, one line": ([post(J, "X-A: " + "a" * 65_536)], "400 x"),
    "64 KiB of head, many lines": (
        [post(J, *(f"X-{i:02}: " + "a" * 1000 for i in range(70)))], "400 x",
    ),
    "60 KB of head, in pieces": (
        [(h := post(J, *(f"X-{i:02}: " + "a" * 1000 for i in range(59))))[:5000], h[5000:40_000],
         h[40_000:]], "200",
    ),
    "a head without end": ([b"POST / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 9000], "400 x"),
}  # fmt: skip

LINES_AND_CONNECTIONS: dict[str, tuple[list[Step], str]] = {
    "lower-case method": ([line("post / HTTP/1.1")], "400 x"),
    "unknown method": ([line("BREW / HTTP/1.1")], "400 x"),
    "a longer method": ([line("POSTX / HTTP/1.1")], "400 x"),
    "PUT": ([line("PUT / HTTP/1.1")], "405"),
    "DELETE": ([line("DELETE / HTTP/1.1")], "405"),
    "PROPFIND": ([line("PROPFIND / HTTP/1.1")], "405"),
    "QUERY": ([line("QUERY / HTTP/1.1")], "405"),
    "GET with a body": ([line("GET /healthz HTTP/1.1") + post(J)], "200 200"),
    "HEAD": ([b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + post(J)], "200 200"),
    "OPTIONS *": ([raw("OPTIONS * HTTP/1.1", "Host: x")], "404"),
    "OPTIONS /": ([raw("OPTIONS / HTTP/1.1", "Host: x")], "405"),
    "POST *": ([line("POST * HTTP/1.1")], "400 x"),
    "CONNECT": ([raw("CONNECT a:80 HTTP/1.1", "Host: x")], "400 x"),
    "absolute-form": ([line("POST http://localhost/ HTTP/1.1")], "200"),
    "absolute-form of another host": ([line("POST http://other:99/ HTTP/1.1")], "200"),
    "absolute-form without a path": ([line("POST http://localhost HTTP/1.1")], "404"),
    "absolute-form with a key": ([line("POST http://localhost/?key=key HTTP/1.1")], "200"),
    "absolute-form, broken": ([line("POST http://[::1/ HTTP/1.1")], "400 x"),
    "absolute-form, a port too far": ([line("POST http://a:99999/ HTTP/1.1")], "400 x"),
    "absolute-form, no host": ([line("POST http:/// HTTP/1.1")], "400 x"),
    "ftp": ([line("POST ftp://localhost/ HTTP/1.1")], "200"),
    "no slash": ([line("POST x HTTP/1.1")], "400 x"),
    "a query": ([line("POST /?a=b&key=c HTTP/1.1")], "200"),
    "an empty query": ([line("POST /? HTTP/1.1")], "200"),
    "a fragment": ([line("POST /#a HTTP/1.1")], "200"),
    "a fragment behind a query": ([line("POST /?a#b HTTP/1.1")], "200"),
    "//": ([line("POST // HTTP/1.1")], "404"),
    "///": ([line("POST /// HTTP/1.1")], "404"),
    "/%2f": ([line("POST /%2f HTTP/1.1")], "404"),
    "/.": ([line("POST /. HTTP/1.1")], "404"),
    "/./": ([line("POST /./ HTTP/1.1")], "404"),
    "/x/..": ([line("POST /x/.. HTTP/1.1")], "404"),
    "/;a": ([line("POST /;a HTTP/1.1")], "404"),
    "/%": ([line("POST /% HTTP/1.1")], "404"),
    "/?%": ([line("POST /?%zz&%=% HTTP/1.1")], "200"),
    "a quoted slash": ([line("POST /?a=%2f HTTP/1.1")], "200"),
    "odd bytes in a query": ([line('POST /?<>"{}|\\^`[] HTTP/1.1')], "200"),
    "/v1/events": ([line("POST /v1/events HTTP/1.1")] * 3, "200 200 200"),
    "/v1/events with a key": ([line("POST /v1/events?key=key HTTP/1.1")], "200"),
    "/v1/events/": ([line("POST /v1/events/ HTTP/1.1")], "404"),
    "/V1/events": ([line("POST /V1/events HTTP/1.1")], "404"),
    "//v1/events": ([line("POST //v1/events HTTP/1.1")], "404"),
    "/v1/%65vents": ([line("POST /v1/%65vents HTTP/1.1")], "200"),
    "PUT /v1/events": ([line("PUT /v1/events HTTP/1.1")], "405"),
    "/v1/events and others": (
        [line("POST /v1/events HTTP/1.1") + get("/healthz") + post(b"{", target="/v1/events")] * 2,
        "200 200 400 200 200 400",
    ),
    "two blanks before the target": ([line("POST  / HTTP/1.1")], "200"),
    "two blanks behind the target": ([line("POST /  HTTP/1.1")], "200"),
    "a tab for a blank": ([line("POST\t/ HTTP/1.1")], "400 x"),
    "a blank in the target": ([line("POST /a b HTTP/1.1")], "400 x"),
    "a blank behind the version": ([line("POST / HTTP/1.1 ")], "400 x"),
    "HTTP/0.9": ([b"POST /\r\n\r\n"], "400 x"),
    "HTTP/0.9 in full": ([line("POST / HTTP/0.9")], "400 x"),
    "HTTP/1.0": ([line("POST / HTTP/1.0")], "200 x"),
    "HTTP/1.0 with keep-alive": ([line("POST / HTTP/1.0", "Connection: keep-alive")] * 2,
                                 "200 200"),
    "HTTP/1.0 without Host": ([raw("POST / HTTP/1.0", f"Content-Length: {N}", body=J)], "200 x"),
    "HTTP/1.0 in chunks": ([raw("POST / HTTP/1.0", CHUNKED, body=chunks(J))], "200 x"),
    "HTTP/1.2": ([line("POST / HTTP/1.2")], "400 x"),
    "HTTP/2.0": ([line("POST / HTTP/2.0")], "400 x"),
    "HTTP/1.10": ([line("POST / HTTP/1.10")], "400 x"),
    "http/1.1": ([line("POST / http/1.1")], "400 x"),
    "RTSP": ([line("POST / RTSP/1.0")], "200 x"),
    "HTTP/2 preface": ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9], "400 x"),
    "TLS": ([b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"], "400 x"),
    "close": ([line("POST / HTTP/1.1", "Connection: close") + post(J)], "200 x"),
    "Close": ([line("POST / HTTP/1.1", "Connection: Close") + post(J)], "200 x"),
    "Keep-Alive": ([line("POST / HTTP/1.1", "Connection: Keep-Alive")], "200"),
    "close, keep-alive": ([line("POST / HTTP/1.1", "Connection: close, keep-alive")], "200 x"),
    "keep-alive, close": ([line("POST / HTTP/1.1", "Connection: keep-alive, close")], "200 x"),
    "Connection twice": (
        [line("POST / HTTP/1.1", "Connection: keep-alive", "Connection: close")], "200 x",
    ),
    "Connection: x": ([line("POST / HTTP/1.1", "Connection: x")], "200"),
    "Connection: content-length": ([line("POST / HTTP/1.1", "Connection: Content-Length")], "200"),
    "an empty Connection": ([line("POST / HTTP/1.1", "Connection:")], "200"),
    "Proxy-Connection: close": ([line("POST / HTTP/1.1", "Proxy-Connection: close")], "200 x"),
    "Expect, and the body": (
        [post(b"", "Expect: 100-continue", f"Content-Length: {N}"), 0.05, J], "100 200",
    ),
    "Expect, the body at once": ([post(J, "Expect: 100-continue")], "100 200"),
    "Expect without a body": ([post(b"", "Expect: 100-continue")], "100 400"),
    "Expect, never a body": (
        [post(b"", "Expect: 100-continue", f"Content-Length: {N}"), LATE], "100 408 x",
    ),
    "Expect, too long": ([post(b"", "Expect: 100-continue", "Content-Length: 999999")],
                         "100 413 x"),
    "Expect: 100-Continue": ([post(J, "Expect: 100-Continue")], "100 200"),
    "Expect: nonsense": ([post(J, "Expect: nonsense")], "400 x"),
    "Expect: nonsense, the body later": ([post(J, "Expect: nonsense")[:-N], J], "400 x"),
    "Expect elsewhere": ([raw("GET /nope HTTP/1.1", "Host: x", "Expect: nonsense")], "400 x"),
    "Expect over HTTP/1.0": ([line("POST / HTTP/1.0", "Expect: nonsense")], "400 x"),
    "h2c upgrade": (
        [line("POST / HTTP/1.1", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c",
              "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")], "200",
    ),
    "Upgrade alone": ([line("POST / HTTP/1.1", "Upgrade: h2c")], "200"),
    "websocket upgrade": (
        [line("GET / HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket",
              "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
         .replace(b"GET /", b"GET /healthz")], "200",
    ),
    "Sec-WebSocket-Key1": ([line("POST / HTTP/1.1", "Sec-WebSocket-Key1: 4 @1  46546xW%0l 1 5")],
                           "400 x"),
    "Content-Type twice": ([post(J, "Content-Type: a/b", "Content-Type: a/c")], "400 x"),
    "Content-Type that is none": ([post(J, "Content-Type: ;;;=")], "200"),
    "Cookie that is none": ([post(J, "Cookie: ;=;\x7e")], "200"),
    "User-Agent twice": ([post(J, "User-Agent: a", "User-Agent: b")], "400 x"),
    "another method in a header": ([post(J, "X-HTTP-Method-Override: DELETE")], "200"),
}  # fmt: skip

MEANING: dict[str, tuple[list[Step], str]] = {
    "identity encoding": ([post(J, "Content-Encoding: identity")], "200"),
    "an empty encoding": ([post(J, "Content-Encoding:")], "200"),
    "gzip": ([post(gzip.compress(J), "Content-Encoding: gzip")], "200"),
    "GZIP": ([post(gzip.compress(J), "Content-Encoding: GZIP")], "200"),
    "gzip, cut": ([post(gzip.compress(J)[:-3], "Content-Encoding: gzip")], "400"),
    "deflate": ([post(zlib.compress(J), "Content-Encoding: deflate")], "200"),
    "br": ([post(J, "Content-Encoding: br")], "415"),
    "gzip, gzip": ([post(gzip.compress(J), "Content-Encoding: gzip, gzip")], "415"),
    "two encodings": (
        [post(gzip.compress(J), "Content-Encoding: gzip", "Content-Encoding: gzip")], "415",
    ),
    "gzip in two pieces": (
        [(p := post(gzip.compress(J), "Content-Encoding: gzip"))[:-10], p[-10:]], "200",
    ),
    "a bomb": ([post(gzip.compress(b" " * 10_000_000), "Content-Encoding: gzip")], "413"),
    "Idempotency-Key": ([post(J, "Idempotency-Key: a")] * 3, "200 200 200"),
    "Idempotency-Key, another body": (
        [post(J, "Idempotency-Key: b"), post(J + b" ", "Idempotency-Key: b"),
         post(LINES, "Idempotency-Key: b"), post(J, "Idempotency-Key: b")], "200 422 422 200",
    ),
    "Idempotency-Key, empty": ([post(J, "Idempotency-Key:")], "400"),
    "Idempotency-Key with a blank": ([post(J, "Idempotency-Key: a b")], "400"),
    "Idempotency-Key with a tab": ([post(J, "Idempotency-Key: a\tb")], "400"),
    "Idempotency-Key, high bytes": ([line("POST / HTTP/1.1", b"Idempotency-Key: \xe9")], "400"),
    "Idempotency-Key of 255": ([post(J, "Idempotency-Key: " + "k" * 255)], "200"),
    "Idempotency-Key of 256": ([post(J, "Idempotency-Key: " + "k" * 256)], "400"),
    "Idempotency-Key twice": ([post(J, "Idempotency-Key: a", "Idempotency-Key: a")], "400"),
    "Idempotency-Key twice, in two cases": (
        [post(J, "Idempotency-Key: a", "idempotency-key: b")], "400",
    ),
    "Idempotency-Keys of many": (
        [post(J, f"Idempotency-Key: k{i % 5}", f"X-Request-ID: r{i}") for i in range(12)],
        " ".join(["200"] * 12),
    ),
    "a key as one in the head": ([post(J, "X-A: Idempotency-Key: z")] * 3, "200 200 200"),
    "a question mark for a key": (
        [post(J, "Idempotency-Key: ?"), post(J, "Idempotency-Key: ??"), post(J, "X-Request-ID: ?")],
        "200 200 200",
    ),
    "X-Request-ID": ([post(J, "X-Request-ID: A-z_0.9")], "200"),
    "x-request-id": ([post(J, "x-request-id: abc", "idempotency-key: q")] * 3, "200 200 200"),
    "X-Request-ID, odd": ([post(J, "X-Request-ID: a/b")], "200"),
    "X-Request-ID of 128": ([post(J, "X-Request-ID: " + "r" * 128)], "200"),
    "X-Request-ID of 129": ([post(J, "X-Request-ID: " + "r" * 129)], "200"),
    "X-Request-ID of 300": ([post(J, "X-Request-ID: " + "r" * 300)], "200"),
    "X-Request-ID twice": ([post(J, "X-Request-ID: a", "X-Request-ID: b")], "200"),
    "X-Request-ID folded": ([post(J, "X-Request-ID: a\r\n b")], "400 x"),
    "X-Request-ID of a refusal": ([post(b"{", "X-Request-ID: abc")] * 3, "400 400 400"),
    "traceparent": ([post(J, f"traceparent: {TRACED}", "tracestate: a=b, c=d")] * 3, "200 200 200"),
    "traceparent, odd": ([post(J, "Traceparent: x"), post(b"{", "Traceparent:")], "200 400"),
    "traceparent twice": ([post(J, f"traceparent: {TRACED}", "traceparent: x")], "200"),
    "Prefer: wait": ([post(J, "Prefer: wait=9") + post(J)] * 2, "200 200 200 200"),
    "Prefer: wait, in two headers": ([post(J, "Prefer: respond-async", "PREFER: wait=9")], "200"),
    "Prefer: wait=0": ([post(J, "Prefer: wait=0"), post(LINES, "Prefer: wait=0")], "202 207"),
    "Prefer: wait, and a batch": ([post(LINES, "Prefer: wait=9"), post(b"{", "Prefer: wait=9")],
                                  "207 400"),
    "Prefer: wait, malformed": ([post(J, "Prefer: wait=x")] * 3, "200 200 200"),
    "Prefer: wait with a key": ([post(J, "Prefer: wait=9", "Idempotency-Key: w")] * 3,
                                "200 200 200"),
    "an array": ([post(TWO)], "200"),
    "NDJSON, good and bad": ([post(LINES)], "207"),
    "an array of bad ones": ([post(b"[{}, 1]")], "400"),
    "an array that is none": ([post(b"[" + J)], "400"),
    "an empty array": ([post(b"[]")], "400"),
    "blanks": ([post(b" \r\n")], "400"),
    "not JSON": ([post(b"nope")], "400"),
    "not UTF-8": ([post(J.replace(b"m", b"\xff"))], "400"),
    "unsupported event": ([post(J.replace(b"crash_report", b"nope"))], "400"),
    "a key is missing": ([post(b'{"event_name": "crash_report"}')], "400"),
    "all of that": (
        [b"".join(map(post, [J, b"{", TWO, b"", LINES, b"[]", b"\0", J]))],
        "200 400 200 400 207 400 400 200",
    ),
    "too long, announced": ([post(b"", "Content-Length: 150001")], "413 x"),
    "too long, whole": ([post(b" " * 150_001) + post(J)], "413 200"),
    "too long, in two pieces": ([post(b" " * 150_001)[:100_000], b" " * 50_200], "413 400 x"),
    "too long, in chunks": ([post(chunks(b" " * 90_000, b" " * 90_000), CHUNKED)], "413"),
    "just as long as it may be": ([post(J.ljust(150_000)), post(J)], "200 200"),
    "a slow body": ([post(J)[:-5], LATE, J[-5:]], "408 x"),
    "a slow body, and more behind it": ([post(J)[:-5], LATE, J[-5:] + post(J)], "408 x"),
    "a slow body, and malformed behind it": ([post(J)[:-5], LATE, J[-5:] + b"}\r\n\r\n"], "408 x"),
    "a slow body of aiohttp's": ([post(chunks(J), CHUNKED)[:-5], LATE], "408 x"),
    "a slow head": ([post(J)[:20], LATE + 0.5], "408 x"),
    "a slow second head": ([post(J) + post(J)[:20], LATE + 0.5], "200 408 x"),
    "a slow head behind aiohttp's": ([get("/healthz") + post(J)[:20], LATE + 0.5], "200 408 x"),
    "not a word": ([LATE + 0.5], "408 x"),
    "leaves in mid body": ([post(J)[:-5], "leave"], "x"),
    "leaves in mid body, chunks": ([post(chunks(J), CHUNKED)[:-5], "leave"], "x"),
    "leaves in mid head": ([post(J)[:20], "leave"], "x"),
}  # fmt: skip

LOCKED: dict[str, tuple[list[Step], str]] = {
    "none": ([post(J)], "401"),
    "none, known": ([post(J)] * 3, "401 401 401"),
    "none, in two pieces": ([post(J)[:-5], J[-5:]], "401"),
    "none, a body that never comes": ([post(J)[:-5]], "401 400 x"),
    "Bearer": ([post(J, "Authorization: Bearer key")] * 3, "200 200 200"),
    "bearer": ([post(J, "Authorization: bearer  key ")], "200"),
    "BEARER and a tab": ([post(J, "Authorization: BEARER\tkey")], "401"),
    "Bearer, wrong": ([post(J, "Authorization: Bearer keys")], "401"),
    "Bearer, empty": ([post(J, "Authorization: Bearer ")], "401"),
    "Bearer, high bytes": ([line("POST / HTTP/1.1", b"Authorization: Bearer k\xe9y")], "401"),
    "no scheme": ([post(J, "Authorization: key")], "401"),
    "empty": ([post(J, "Authorization:")], "401"),
    "Digest": ([post(J, "Authorization: Digest key")], "401"),
    "Basic": ([post(J, basic("anybody", "s p+/"))], "200"),
    "Basic, no user": ([post(J, basic("", "key"))], "200"),
    "Basic, wrong": ([post(J, basic("key", "x"))], "401"),
    "Basic, broken": ([post(J, "Authorization: Basic !!!")], "401"),
    "Basic, no colon": ([post(J, "Authorization: Basic a2V5")], "401"),
    "twice": ([post(J, "Authorization: Bearer key", "Authorization: Bearer x")], "200"),
    "twice, the other way round": (
        [post(J, "Authorization: Bearer x", "Authorization: Bearer key")], "401",
    ),
    "query": ([post(J, target="/?key=key")] * 3, "200 200 200"),
    "query, quoted": ([post(J, target="/?key=s%20p%2B%2F")], "200"),
    "query, plus": ([post(J, target="/?key=s+p%2B%2F")], "200"),
    "query, not quoted": ([post(J, target="/?key=s+p+/")], "401"),
    "query, twice": ([post(J, target="/?key=key&key=x"), post(J, target="/?key=x&key=key")],
                     "200 401"),
    "query, among others": ([post(J, target="/?a=b&key=key&c")], "200"),
    "query, a semicolon": ([post(J, target="/?a=b;key=key")], "401"),
    "query, its name quoted": ([post(J, target="/?%6bey=key")], "200"),
    "query, capitals": ([post(J, target="/?KEY=key")], "401"),
    "query, no UTF-8": ([post(J, target="/?key=%ff")], "401"),
    "query, a fragment": ([post(J, target="/?key=key#x")], "200"),
    "query, wrong header": ([post(J, "Authorization: Bearer x", target="/?key=key")], "401"),
    "query, odd header": ([post(J, "Authorization: Digest x", target="/?key=key")], "200"),
    "one and another on a connection": (
        [post(J, "Authorization: Bearer key"), post(J, "Authorization: Bearer x"), post(J),
         post(J, "Authorization: Bearer key")], "200 401 401 200",
    ),
    "key and Idempotency-Key": (
        [post(J, "Authorization: Bearer key", "Idempotency-Key: a"),
         post(J, basic("", "s p+/"), "Idempotency-Key: a")], "200 200",
    ),
    "Origin, listed": ([post(J, f"Origin: {SHOP}", "Authorization: Bearer key")] * 3,
                       "200 200 200"),
    "Origin, not listed": ([post(J, "Origin: https://evil", "Authorization: Bearer key")], "200"),
    "Origin, listed, no key": ([post(J, f"Origin: {SHOP}")], "401"),
    "Origin, null": ([post(J, "Origin: null", target="/?key=key")], "200"),
    "Origin, twice": (
        [post(J, f"Origin: {SHOP}", "Origin: https://evil", target="/?key=key")], "200",
    ),
    "Origin, a batch": ([post(LINES, f"Origin: {SHOP}", target="/?key=key")], "207"),
    "Origin, a preflight": (
        [raw("OPTIONS / HTTP/1.1", "Host: x", f"Origin: {SHOP}",
             "Access-Control-Request-Method: POST"), post(J, target="/?key=key")], "204 200",
    ),
}  # fmt: skip

OTHERS: dict[str, dict[str, tuple[list[Step], str]]] = {
    "everybody": {
        "Origin": ([post(J, "Origin: https://any")] * 2, "200 200"),
        "no Origin": ([post(J)], "200"),
        "a fold in Origin": ([post(J, "Origin: https://any\r\n .example")], "400 x"),
    },
    "full": {
        "one": ([post(J)] * 2, "503 503"),
        "a batch": ([post(LINES)], "503"),
        "with a key": ([post(J, "Idempotency-Key: a")], "503"),
        "bad": ([post(b"{")], "400"),
    },
    "small": {
        "an event too long": ([post(json.dumps(crash("x" * 100)).encode())], "400"),
        "a batch too long": ([post(b"[" + b",".join([J] * 4) + b"]")], "413"),
        "a batch just so": ([post(b"[" + b",".join([J] * 3) + b"]")], "200"),
    },
    "stopping": {
        "one": ([post(J) * 2], "503 x"),
        "in two pieces": ([post(J)[:-5], J[-5:]], "503 x"),
        "a batch": ([post(LINES)], "503 x"),
        "bad": ([post(b"{")], "503 x"),
        "elsewhere": ([get("/healthz") + post(J)], "200 503 x"),
    },
    "broken": {
        "one": ([post(J, "X-Request-ID: abc") * 2], "500 500"),
        "a batch": ([post(TWO)], "200"),
        "in two pieces": ([post(J)[:-5], J[-5:]], "500"),
    },
}  # fmt: skip

CASES = [
    pytest.param(kind, *case, id=f"{kind}: {name}")
    for kind, cases in [
        ("open", FRAMING | HEADS | LINES_AND_CONNECTIONS | MEANING), ("locked", LOCKED),
        *OTHERS.items(),
    ]
    for name, case in cases.items()
]  # fmt: skip


@pytest.mark.parametrize(("kind", "steps", "wanted"), CASES)
def test_both_ways_answer_alike(ways: Ways, kind: str, steps: list[Step], wanted: str) -> None:
    with faults() as logged:
        plain, other = ways.talk(kind, *steps, probe="leave" not in steps).values()
    assert plain == other
    assert plain.statuses == wanted
    assert b"text/plain" not in plain.answers
    assert bool(logged) == (kind == "broken")


def test_both_ways_note_the_trace(ways: Ways) -> None:
    traced = f"traceparent: {TRACED}"
    with faults() as logged:
        ways.talk("broken", post(J, traced))
    assert [line.get("trace_id") for line in logged].count(TRACE) == 2  # once in each
    assert [line.get("span_id") for line in logged].count(SPAN) == 2
    steps = post(b"{", traced), post(LINES, traced), post(b"{", "traceparent: x"), post(J, traced)
    ways.talk("open", *steps)
    for way in ways.of("open").values():
        refused = way.pipeline.status.records.refusals()[:3]
        assert [(each["trace_id"], each["span_id"]) for each in refused] == [
            (None, None), (TRACE, SPAN), (TRACE, SPAN),
        ]  # fmt: skip


def test_the_corpus_is_whole() -> None:
    names = [case.id for case in CASES]
    assert (
        len(set(names))
        == len(names)
        == sum(map(len, OTHERS.values()))
        + sum(map(len, (FRAMING, HEADS, LINES_AND_CONNECTIONS, MEANING, LOCKED)))
    )
