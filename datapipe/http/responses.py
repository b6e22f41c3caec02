"""The answers of `POST /`, and of every error: JSON with `status_code` and `status_message`."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
import structlog
from aiohttp import web

from datapipe.errors import Busy, RateLimited, Reason, Refused
from datapipe.http.body import Headers
from datapipe.http.traceparent import trace_ids

log = structlog.stdlib.get_logger("datapipe.http.responses")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MAX_ERRORS = 100  # of a batch, reported one by one
# In one line, as RFC 9110 (section 11.6.1) allows; Basic comes first, as Chromium takes a line for
# one scheme, which it asks the user for if it is Basic. Bearer: RFC 6750, section 3
_SCHEMES = 'Basic realm="datapipe", charset="UTF-8", Bearer realm="datapipe"'


class Answer(NamedTuple):
    """One answer, independent of how it is sent; `close` ends the connection."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}
    close: bool = False

    def response(self) -> web.Response:
        """As a response of aiohttp."""
        response = web.Response(
            status=self.status, body=self.body, content_type="application/json",
            headers=self.headers,
        )  # fmt: skip
        if self.close:
            response.force_close()
        return response

    def wire(self, request_id: str) -> bytes:
        """As it goes over the wire, in one piece."""
        more = ""
        if self.headers or self.close:
            more = "".join([f"{name}: {value}\r\n" for name, value in self.headers.items()])
            more += "Connection: close\r\n" if self.close else ""
        start = _start(self.status, len(self.body), int(time.time()))
        return f"{start}X-Request-ID: {request_id}\r\n{more}\r\n".encode() + self.body


@lru_cache(64)
def _start(status: int, length: int, second: int) -> str:
    """What all answers of a second have in common."""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
        f"Date: {formatdate(second, usegmt=True)}\r\n"
    )


def request_id(headers: Mapping[str, str]) -> str:
    """The request's own `X-Request-ID`, or a new one where it has none that can be taken over."""
    if "X-Request-ID" in headers and _REQUEST_ID.fullmatch(given := headers["X-Request-ID"]):
        return given
    return f"{random.getrandbits(64):016x}"  # to tell requests apart in logs: no secret


OK = Answer(200, b'{"status_code": 0, "status_message": "ok"}')


def answer(
    status: int, code: int, message: str, extra: Mapping[str, Any] | None = None, **more: Any
) -> Answer:
    """One answer in the common form."""
    body = msgspec.json.encode({"status_code": code, "status_message": message, **(extra or {})})
    return Answer(status, msgspec.json.format(body, indent=0), **more)


def plain(content: Any) -> web.Response:
    """An answer that is not in the common form."""
    return web.Response(
        body=msgspec.json.encode(content),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def internal_error(error: BaseException, headers: Headers, request_id: str, path: str) -> Answer:
    """The answer to an unexpected exception; `headers` are the request's."""
    log.error("fault", exc_info=error, request_id=request_id, path=path, **trace_ids(headers))
    return answer(500, 100, f"internal server error; request id {request_id}")


def refused(exc: Refused, *, stopping: bool = False) -> Answer:
    """The answer to a request that is refused as a whole."""
    headers, close, extra = {}, exc.reason is Reason.TIMEOUT, None
    if isinstance(exc, Busy | RateLimited):
        headers, close = _retry_after(exc), stopping
        extra = {"busy": exc.lanes} if isinstance(exc, Busy) and exc.lanes else None
    elif exc.status == 401:
        headers = {"WWW-Authenticate": _SCHEMES}
    return answer(exc.status, exc.reason.code, exc.detail, extra, headers=headers, close=close)


def _retry_after(exc: Busy | RateLimited) -> dict[str, str]:
    """In whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(exc.retry_after_s)))}


def waited(answer: Answer, seconds: int, loaded: bool, dead: int) -> Answer:
    """The same answer to a POST that was to wait so long for its load, and what came of that.

    Args: dead: events that are dead letters. Source: RFC 7240, sections 3 and 4.3.
    """
    status = 202 if answer.status == 200 and not loaded else answer.status
    said = {"loaded": loaded, "dead": dead} if loaded else {"loaded": loaded}
    more = msgspec.json.format(msgspec.json.encode(said), indent=0)[1:]
    return answer._replace(
        status=status, body=answer.body[:-1] + b", " + more,
        headers={**answer.headers, "Preference-Applied": f"wait={seconds}"},
    )  # fmt: skip


def batch(accepted: int, errors: Sequence[tuple[int, Refused]], full: Sequence[str] = ()) -> Answer:
    """The answer to a batch: what was accepted, and why the rest was not.

    Args:
        errors: in the order of the events.
        full: lanes that have no room, in order; their events stand in `errors` with code 9.
    """
    extra: dict[str, Any] = {"accepted": accepted, "rejected": len(errors)}
    headers = {}
    status, code, message = 200, 0, "ok"
    if errors:
        first = errors[0][1]
        status, code, message = first.status, first.reason.code, first.detail
        extra["errors"] = [
            {"index": index, "status_code": exc.reason.code, "status_message": exc.detail}
            for index, exc in errors[:MAX_ERRORS]
        ]
    if accepted and errors:
        status, code, message = 207, 1, f"{accepted} accepted, {len(errors)} rejected"
    if full:
        extra["busy"] = full
        headers = _retry_after(next(exc for _, exc in errors if isinstance(exc, Busy)))
        if not accepted:
            status, code, message = 503, 9, f"no room for {', '.join(full)}"
    return answer(status, code, message, extra, headers=headers)
