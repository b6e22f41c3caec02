"""A body as it comes over the wire: received within limits, decompressed in bounded steps.

aiohttp's own decompression is switched off: it hands a cut-off gzip body on without an error, and
lets `gzip, gzip` through compressed.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from datapipe.errors import EventRejected, Reason
from datapipe.http.admission import Reservation
from datapipe.settings import Settings

Headers = CIMultiDict[str] | CIMultiDictProxy[str]


class Body(NamedTuple):
    """A body that is on its way.

    Attributes:
        length: in bytes, where it was announced.
        read: the next bytes, none at the end; raises RequestPayloadError, ConnectionError.
    """

    length: int | None
    read: Callable[[], Awaitable[bytes]]


_FIRST_FEED_BYTES = 256
_STEP_BYTES = 262_144  # decompressed before other requests get a turn

# Source: zlib manual, inflateInit2: 16 + 15 reads a gzip header, 15 a zlib one, -15 none
_WBITS = {"gzip": 31, "deflate": 15}


async def read_body(
    source: bytes | Body, headers: Headers, settings: Settings, reservation: Reservation
) -> bytes:
    """The body of a request, decompressed, at most `body_max_len` bytes.

    Args: source: the body, or how it is read while some of it may be on its way.
    Raises: EventRejected: too long, too slow, broken. BufferFull: too much is under way.
    """
    max_bytes, encoding = settings.body_max_len, _encoding_of(headers)
    if isinstance(source, bytes):
        if len(source) > max_bytes:
            raise _too_long(max_bytes)
        reservation.grow(len(source))
        body = source
    else:
        body = await _receive(source, max_bytes, settings.request_timeout, reservation)
    if encoding == "identity":
        return body
    return await _decompress(body, encoding, max_bytes, reservation)


def _encoding_of(headers: Headers) -> str:
    """`gzip`, `deflate` or `identity`. Raises: EventRejected: any other."""
    if "Content-Encoding" not in headers:
        return "identity"
    encoding = ",".join(headers.getall("Content-Encoding")).strip().lower()
    if encoding in ("", "identity"):
        return "identity"
    if encoding not in _WBITS:
        detail = f"Content-Encoding: {encoding[:64]!r} is not one of gzip, deflate, identity"
        raise EventRejected(Reason.UNSUPPORTED_ENCODING, detail)
    return encoding


async def _receive(
    coming: Body, max_bytes: int, timeout_s: float, reservation: Reservation
) -> bytes:
    if (coming.length or 0) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await coming.read():
                reservation.grow(len(chunk))
                body += chunk
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
    except TimeoutError:
        detail = f"the body was not complete within {timeout_s:g} s"
        raise EventRejected(Reason.TIMEOUT, detail) from None
    except (web.RequestPayloadError, ConnectionError) as exc:  # the latter: the client has left
        raise EventRejected(Reason.BAD_JSON, f"the body is broken: {exc}") from None
    return bytes(body)


async def _decompress(
    compressed: bytes, encoding: str, max_bytes: int, reservation: Reservation
) -> bytes:
    wbits = _WBITS[encoding]
    if encoding == "deflate" and not _has_zlib_header(compressed):
        wbits = -15  # many clients send the bare stream
    body = bytearray()
    view, at, since_turn = memoryview(compressed), 0, 0
    while True:
        decompressor = zlib.decompressobj(wbits)
        feed = _FIRST_FEED_BYTES  # zlib copies the input that it leaves unused: so little at first
        while not decompressor.eof:
            given = view[at : at + feed]
            try:
                step = decompressor.decompress(given, _STEP_BYTES)
            except zlib.error as exc:
                raise _broken(encoding, str(exc)) from None
            taken = len(given) - len(decompressor.unconsumed_tail) - len(decompressor.unused_data)
            if not step and not taken and not decompressor.eof:
                raise _broken(encoding, "it is cut off")
            at += taken
            feed = min(2 * feed, _STEP_BYTES)
            reservation.grow(len(step))
            body += step
            if len(body) > max_bytes:
                raise _too_long(max_bytes)
            since_turn += len(step) + 512  # an empty step costs time as well
            if since_turn >= _STEP_BYTES:
                since_turn = 0
                await asyncio.sleep(0)
        if at == len(compressed):
            return bytes(body)
        if encoding != "gzip":  # only gzip may go on with another member
            raise _broken(encoding, "something follows its end")


def _has_zlib_header(compressed: bytes) -> bool:
    """Source: RFC 1950, section 2.2: method 8, and the first two bytes a multiple of 31."""
    first = compressed[:2]
    return len(first) == 2 and first[0] & 15 == 8 and int.from_bytes(first) % 31 == 0


def _broken(encoding: str, why: str) -> EventRejected:
    return EventRejected(Reason.BAD_JSON, f"the {encoding} body is broken: {why}")


def _too_long(max_bytes: int) -> EventRejected:
    detail = f"body longer than {max_bytes} bytes, which body_max_len sets"
    return EventRejected(Reason.TOO_LONG, detail, 413)
