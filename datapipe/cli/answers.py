"""Why a service does not answer, for people."""

from __future__ import annotations

import os
import ssl

import aiohttp


def unanswered(exc: BaseException) -> str:
    """What the system says of the connection, in its words. Args: exc: of a request by aiohttp."""
    if isinstance(exc, aiohttp.ClientConnectorError):
        cause = exc.os_error
        if not isinstance(cause, ssl.SSLError) and (cause.errno or 0) > 0:
            return os.strerror(cause.errno or 0)
        return cause.strerror or str(cause)
    return str(exc) or "not in time"
