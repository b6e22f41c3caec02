"""Connections that aiohttp serves: their bytes are passed on, and their syntax is followed.

aiohttp answers a request that it can't parse as plain text, has no time limit for a head, and
reports to nobody when it has answered. So the bytes are followed on their way, by the parser that
judges all heads; a middleware reports what was answered.
"""

from __future__ import annotations

import asyncio

from datapipe.errors import Refused
from datapipe.http.heads import Syntax


class Relay:
    """One connection on its way to aiohttp, from the first byte of a request.

    Attributes: refused: why what came last goes no further: it is malformed.
    """

    def __init__(self, handler: asyncio.Protocol, transport: asyncio.Transport) -> None:
        self.handler = handler
        self.refused: Refused | None = None
        self._syntax: Syntax | None = Syntax()
        self._answered = 0
        handler.connection_made(transport)

    @property
    def idle(self) -> bool:
        """Whether no request is under way: what is written now does not end up in an answer."""
        return self._syntax is not None and self._syntax.heads == self._answered

    @property
    def in_head(self) -> bool:
        """Whether it waits for the rest of a head."""
        return self.idle and self._syntax is not None and self._syntax.in_head

    def data_received(self, data: bytes) -> None:
        if self.refused is not None:
            return
        if (syntax := self._syntax) is not None:
            heads, in_body = syntax.heads, syntax.in_body
            try:
                if not syntax.feed(data):
                    self._syntax = None
            except Refused as exc:
                if syntax.heads == heads and not in_body:  # nothing but this is in the data
                    self.refused = exc
                    return
                self._syntax = None  # aiohttp finds it as well
        self.handler.data_received(data)

    def answered(self) -> None:
        """A request was answered."""
        self._answered += 1
