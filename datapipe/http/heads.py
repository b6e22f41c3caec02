"""Heads of requests: parsed by llhttp (`httptools`), and remembered by their bytes.

A client sends the same head again and again over a connection that is kept alive, so what a head
means is looked up rather than parsed. Only syntax is remembered: who may post is judged anew for
each request.

A head is *plain* if nothing about it is out of the ordinary: a POST of events over HTTP/1.1 that
says how long its body is. All others are aiohttp's to judge. So this is strict: what is called
plain here, aiohttp must read in the same way.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from multidict import CIMultiDict
from yarl import URL

from datapipe.errors import Reason, Refused
from datapipe.http.auth import Credentials
from datapipe.http.prefer import wait_seconds

PATHS = ("/", "/v1/events")  # that take events
MAX_HEAD_BYTES = 65_536
PLAIN_HEAD_BYTES = 8192  # at most, of a plain one
END = b"\r\n\r\n"

_MAX_LINE_BYTES, _MAX_HEADERS = 8190, 128  # as aiohttp's, which would not answer in JSON
_MAX_DIGITS = 18  # of a length; aiohttp takes 2**64 - 1 for none
_TOO_LONG = f"the head is longer than {MAX_HEAD_BYTES} bytes"
# Two of them contradict each other. Source: aiohttp, SINGLETON_HEADERS; RFC 9110, section 5.3
_SINGLE = frozenset(
    b"content-length content-location content-range content-type etag host max-forwards server"
    b" transfer-encoding user-agent".split()
)
# nothing but printable ASCII, and no line that continues the one before (obs-fold)
_PLAIN = re.compile(rb"(?:[!-~][ -~]*\r\n)+\r\n")
_NOT_PLAIN = frozenset(b"transfer-encoding expect upgrade proxy-connection".split())
# headers whose values differ from request to request; looking ahead for their initials is faster
_VARYING = re.compile(
    rb"\r\n(?=[IiTtXx])"
    rb"([Ii]dempotency-[Kk]ey|[Xx]-[Rr]equest-[Ii][Dd]|[Tt]race(?:parent|state)): ?"
    rb"([!-~]{1,255})(?=\r\n)"
)
_REMEMBERED, _REMEMBERED_BYTES = 1024, 262_144
_SEEN_ONCE = 4096


class Head(NamedTuple):
    """A plain head.

    Attributes:
        length: bytes of the body that follows.
        credentials: who sends it, for the ingest to judge.
        waits: it asks to wait: see `prefer`.
    """

    length: int
    headers: CIMultiDict[str]
    credentials: Credentials
    waits: bool


class Syntax:
    """Follows the requests of one connection, from the first byte of a head.

    Attributes:
        heads: how many are complete.
        in_head, in_body: what has begun and is not complete.
        length: of the body of the last head, in bytes; 0 where it comes in chunks.
        method, url, headers, version: of the last head; names: those of its headers, in lower case.
    """

    def __init__(self) -> None:
        self.heads = self.length = 0
        self.in_head = self.in_body = False
        self.url = self.method = b""
        self.version = ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.names: list[bytes] = []
        self._head_bytes = 0
        self._why = ""
        self._parser = HttpRequestParser(self)

    def feed(self, data: bytes) -> bool:
        """Follow what comes next; false: another protocol is asked for, so this can't go on.

        Raises: Refused: it is malformed.
        """
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self.in_head = False
            return False
        except HttpParserError as exc:
            self._why = self._why or str(exc)
        if not self.in_head:
            self._head_bytes = 0
        elif self._head_bytes > MAX_HEAD_BYTES:
            self._why = _TOO_LONG
        if self._why:
            raise Refused(Reason.BAD_JSON, " ".join(self._why.split())[:200])
        return True

    # --- called by httptools ---

    def on_message_begin(self) -> None:
        self.in_head, self.in_body = True, False
        self.url, self.headers = b"", []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head and name.lower() in _SINGLE:
            self._why = "a trailer contradicts the head"
            raise ValueError(self._why)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.in_head, self.in_body = False, True
        self.heads += 1
        self.method, self.version = self._parser.get_method(), self._parser.get_http_version()
        self.names = [name.lower() for name, _ in self.headers]
        if why := self._why_refused():
            self._why = why
            raise ValueError(why)  # so httptools goes no further
        named = dict(zip(self.names, self.headers, strict=True))
        self.length = int(named.get(b"content-length", (b"", b"0"))[1])

    def _why_refused(self) -> str | None:
        """What aiohttp would refuse, but not in JSON, or what it would not refuse."""
        if self._head_bytes > _MAX_LINE_BYTES:  # else no line can be longer
            if self._head_bytes > MAX_HEAD_BYTES:
                return _TOO_LONG
            lines = (self.url, *itertools.chain.from_iterable(self.headers))
            if max(map(len, lines)) > _MAX_LINE_BYTES:
                return f"a line of the head is longer than {_MAX_LINE_BYTES} bytes"
        if self.version not in ("1.0", "1.1"):
            return "the version of HTTP is neither 1.0 nor 1.1"
        if not self.url.startswith(b"/") and not self._has_host():
            return "the target is neither a path nor a URL"
        if len(self.names) > _MAX_HEADERS:
            return f"more than {_MAX_HEADERS} headers"
        for name in _SINGLE if len(set(self.names)) < len(self.names) else ():
            if self.names.count(name) > 1:
                return f"{name.decode()}: this header is there twice"
        if self.version == "1.1" and b"host" not in self.names:
            return "host: this header is missing"
        for name, (_, value) in zip(self.names, self.headers, strict=True):
            if name == b"content-length" and len(value.strip()) > _MAX_DIGITS:
                return "content-length: too long"
            if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
                return "transfer-encoding: nothing but chunked is known"
            if name == b"expect" and value.strip().lower() != b"100-continue":
                return "expect: nothing but 100-continue is known"
            if name == b"sec-websocket-key1":
                return "sec-websocket-key1: a draft of WebSocket"
        return None

    def _has_host(self) -> bool:
        """Whether the target is the whole URL, as for a proxy, or the `*` of OPTIONS."""
        if self.url == b"*":
            return self.method == b"OPTIONS"
        try:
            return b"://" in self.url and bool(URL(self.url.decode(), encoded=True).raw_host)
        except ValueError:
            return False

    def on_message_complete(self) -> None:
        self.in_body = False


class Heads:
    """Plain heads that came more than once, by their bytes; bounded in number and bytes."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self._bytes = 0
        self._seen: set[int] = set()

    def read(self, head: bytes) -> Head | None:
        """What a head says, from its first byte to its blank line; None: it is not plain.

        Raises: Refused: it is malformed.
        """
        if (found := self._known.get(head)) is not None:
            return found
        varying, match = {}, _VARYING.search(head)
        while match:  # looked up without such a value, which doesn't touch syntax
            varying[match[1]] = match[2]
            at = match.start(2) + 1
            head = head[: at - 1] + b"?" + head[match.end(2) :]
            match = _VARYING.search(head, at)
        found = self._known.get(head)
        if found is None:
            if (found := _parse(head)) is None:
                return None
            self._remember(head, found)
        if not varying:
            return found
        headers = found.headers.copy()
        for name, value in varying.items():
            headers[name.decode()] = value.decode()
        # not `_replace`, which takes five times as long
        return Head(found.length, headers, found.credentials, found.waits)

    def _remember(self, head: bytes, parsed: Head) -> None:
        """At its second sight, so that heads that never come again don't fill the table."""
        if (seen := hash(head)) not in self._seen:
            if len(self._seen) >= _SEEN_ONCE:
                self._seen.clear()
            self._seen.add(seen)
            return
        self._bytes += len(head)
        if len(self._known) >= _REMEMBERED or self._bytes > _REMEMBERED_BYTES:
            self.forget()
            self._bytes = len(head)
        self._known[head] = parsed

    def forget(self) -> None:
        """Forget all of them."""
        self._known.clear()
        self._seen.clear()
        self._bytes = 0


def _parse(head: bytes) -> Head | None:
    syntax = Syntax()
    if not syntax.feed(head) or not _is_plain(head, syntax):
        return None
    path, _, query = syntax.url.decode().partition("?")
    if path not in PATHS or "#" in query:
        return None
    headers = CIMultiDict(
        [(name.decode(), value.decode().rstrip()) for name, value in syntax.headers]
    )
    if headers.get("Connection", "keep-alive").lower() != "keep-alive":
        return None
    key = URL.build(path="/", query_string=query, encoded=True).query.get("key") if query else None
    length = int(headers.get("Content-Length", "0"))
    credentials = Credentials(headers.get("Authorization"), key)
    return Head(length, headers, credentials, wait_seconds(headers) is not None)


def _is_plain(head: bytes, syntax: Syntax) -> bool:
    return (
        syntax.heads == 1
        and syntax.method == b"POST"
        and syntax.version == "1.1"
        and len(set(syntax.names)) == len(syntax.names)
        and _NOT_PLAIN.isdisjoint(syntax.names)
        and len(head) <= PLAIN_HEAD_BYTES
        and _PLAIN.fullmatch(head) is not None
    )
