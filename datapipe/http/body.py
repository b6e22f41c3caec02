"""A body as it comes over the wire: read within bounds, unpacked in bounded steps.

aiohttp's own unpacking is switched off: it hands a cut-off gzip body on without an error, and lets
`gzip, gzip` through packed.
"""

from __future__ import annotations

import asyncio
import zlib

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from datapipe.errors import BufferFull, EventRejected, Reason

Headers = CIMultiDict[str] | CIMultiDictProxy[str]

SMALL_BODY_BYTES = 65_536
_FIRST_FEED_BYTES = 256
_STEP_BYTES = 262_144  # unpacked before other requests get a turn

# Source: zlib manual, inflateInit2: 16 + 15 reads a gzip header, 15 a zlib one, -15 none
_WBITS = {"gzip": 31, "deflate": 15}


class Inflight:
    """Bytes received, and rows not yet durable, over all requests.

    A quarter is kept for small bodies, so that a few large ones can't shut out the rest.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes

    def check(self, of_this_body: int) -> None:
        """Raises: BufferFull: one more byte would be too many."""
        share = 0.75 if of_this_body > SMALL_BODY_BYTES else 1.0
        if self.bytes > self._max_bytes * share:
            raise BufferFull("too much is under way (inflight_max_bytes)", retry_after_s=1.0)


class Lease:
    """What one request holds of `Inflight`; given back when the request is over."""

    __slots__ = ("_held", "_inflight")

    def __init__(self, inflight: Inflight) -> None:
        self._inflight = inflight
        self._held = 0

    def take(self, count: int) -> None:
        """Raises: BufferFull."""
        self._held += count
        self._inflight.bytes += count
        self._inflight.check(self._held)

    def release(self) -> None:
        self._inflight.bytes -= self._held
        self._held = 0


async def read_body(
    request: web.BaseRequest, max_bytes: int, timeout_s: float, lease: Lease
) -> bytes:
    """The body of a request, which may still be on its way; unpacked at most `max_bytes`.

    Raises: EventRejected: too long, too slow, broken. BufferFull: too much is under way.
    """
    encoding = _encoding_of(request.headers)
    if (request.content_length or 0) > max_bytes:
        raise _too_long(max_bytes)
    body = await _read(request, max_bytes, timeout_s, lease)
    return body if encoding == "identity" else await _unpack(body, encoding, max_bytes, lease)


async def unpacked(packed: bytes, headers: Headers, max_bytes: int, lease: Lease) -> bytes:
    """The same of a body that is here. Raises: EventRejected, BufferFull."""
    lease.take(len(packed))
    if len(packed) > max_bytes:
        raise _too_long(max_bytes)
    if "Content-Encoding" not in headers or (encoding := _encoding_of(headers)) == "identity":
        return packed
    return await _unpack(packed, encoding, max_bytes, lease)


def _encoding_of(headers: Headers) -> str:
    """`gzip`, `deflate` or `identity`. Raises: EventRejected: any other."""
    encoding = ",".join(headers.getall("Content-Encoding", [])).strip().lower()
    if encoding in ("", "identity"):
        return "identity"
    if encoding not in _WBITS:
        detail = f"Content-Encoding: {encoding[:64]!r} is none of gzip, deflate, identity"
        raise EventRejected(Reason.UNSUPPORTED_ENCODING, detail)
    return encoding


async def _read(request: web.BaseRequest, max_bytes: int, timeout_s: float, lease: Lease) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                lease.take(len(chunk))
                body += chunk
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
    except TimeoutError:
        detail = f"the body was not complete within {timeout_s:g} s"
        raise EventRejected(Reason.TIMEOUT, detail) from None
    except (web.RequestPayloadError, ConnectionError) as exc:  # the latter: the client has left
        raise EventRejected(Reason.BAD_JSON, f"the body is broken: {exc}") from None
    return bytes(body)


async def _unpack(packed: bytes, encoding: str, max_bytes: int, lease: Lease) -> bytes:
    wbits = _WBITS[encoding]
    if encoding == "deflate" and not _has_zlib_header(packed):
        wbits = -15  # many clients mean the bare stream
    body = bytearray()
    view, at, since_turn = memoryview(packed), 0, 0
    while True:
        unpacker = zlib.decompressobj(wbits)
        feed = _FIRST_FEED_BYTES  # zlib copies what it is given and leaves: little, at first
        while not unpacker.eof:
            given = view[at : at + feed]
            try:
                step = unpacker.decompress(given, _STEP_BYTES)
            except zlib.error as exc:
                raise _broken(encoding, str(exc)) from None
            taken = len(given) - len(unpacker.unconsumed_tail) - len(unpacker.unused_data)
            if not step and not taken and not unpacker.eof:
                raise _broken(encoding, "it is cut off")
            at += taken
            feed = min(2 * feed, _STEP_BYTES)
            lease.take(len(step))
            body += step
            if len(body) > max_bytes:
                raise _too_long(max_bytes)
            since_turn += len(step) + 512  # an empty step costs time as well
            if since_turn >= _STEP_BYTES:
                since_turn = 0
                await asyncio.sleep(0)
        if at == len(packed):
            return bytes(body)
        if encoding != "gzip":  # only gzip may go on with another member
            raise _broken(encoding, "something follows its end")


def _has_zlib_header(packed: bytes) -> bool:
    """Source: RFC 1950, section 2.2: method 8, and the first two bytes a multiple of 31."""
    return len(packed) >= 2 and packed[0] & 15 == 8 and (packed[0] << 8 | packed[1]) % 31 == 0


def _broken(encoding: str, why: str) -> EventRejected:
    return EventRejected(Reason.BAD_JSON, f"the {encoding} body is broken: {why}")


def _too_long(max_bytes: int) -> EventRejected:
    return EventRejected(Reason.TOO_LONG, f"body longer than {max_bytes} bytes", 413)
