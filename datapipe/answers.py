"""The answers of `POST /`, and of every error: JSON with `status_code` and `status_message`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web

from datapipe.errors import Busy, EventRejected

MAX_ERRORS = 100  # of a batch, told one by one
OK = b'{"status_code": 0, "status_message": "ok"}'


def answer(
    status: int, code: int, message: str, extra: Mapping[str, Any] | None = None
) -> web.Response:
    """One answer in the form that all of them have."""
    body = msgspec.json.encode({"status_code": code, "status_message": message, **(extra or {})})
    return web.Response(
        status=status, body=msgspec.json.format(body, indent=0), content_type="application/json"
    )


def plain(content: Any) -> web.Response:
    """An answer in a form of its own."""
    return web.Response(
        body=msgspec.json.encode(content),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def ok() -> web.Response:
    """The answer to one event that is durable."""
    return web.Response(body=OK, content_type="application/json")


def rejected(exc: EventRejected) -> web.Response:
    """The answer to a body, or a single event, that is refused."""
    response = answer(exc.status, exc.code, exc.detail)
    if exc.status == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="datapipe", charset="UTF-8"'
    if exc.status == 408:
        response.force_close()
    return response


def busy(exc: Busy) -> web.Response:
    """503, code 9: nothing was promised, and when to try again."""
    response = answer(503, 9, exc.detail)
    response.headers["Retry-After"] = retry_after(exc.retry_after_s)
    return response


def retry_after(seconds: float) -> str:
    """Whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))


def batch(
    accepted: int,
    errors: Sequence[tuple[int, EventRejected]],
    full: Sequence[str] = (),
    retry_after_s: float = 5.0,
) -> web.Response:
    """The answer to a batch: what was taken, and why the rest was not.

    Args: full: lanes that have no room, whose events stand in `errors` with code 9.
    """
    extra: dict[str, Any] = {"accepted": accepted, "rejected": len(errors)}
    status, code, message = 200, 0, "ok"
    if errors:
        first = min(errors, key=lambda error: error[0])[1]
        status, code, message = first.status, first.code, first.detail
        extra["errors"] = [
            {"index": index, "status_code": exc.code, "status_message": exc.detail}
            for index, exc in sorted(errors, key=lambda error: error[0])[:MAX_ERRORS]
        ]
    if accepted and errors:
        status, code, message = 207, 1, f"{accepted} accepted, {len(errors)} rejected"
    if full:
        extra["busy"] = sorted(full)
        if not accepted:
            status, code = 503, 9
            message = f"no room for {', '.join(sorted(full))}"
    response = answer(status, code, message, extra)
    if full:
        response.headers["Retry-After"] = retry_after(retry_after_s)
    return response
