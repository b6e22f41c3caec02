"""Why a service did not answer, for people."""

from __future__ import annotations

import aiohttp


def no_answer(exc: Exception) -> str:
    """What the system says, without what aiohttp adds. Args: exc: of a request by it."""
    if not isinstance(exc, aiohttp.ClientConnectorError):
        return str(exc) or "not in time"
    if isinstance(exc.os_error, ConnectionRefusedError):
        return "connection refused"
    return exc.os_error.strerror or str(exc.os_error)
