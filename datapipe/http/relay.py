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
        self._syntax: Syntax | None = Syntax()  # None: it can't be followed any more
        self._begun = self._answered = 0  # requests
        handler.connection_made(transport)

    @property
    def idle(self) -> bool:
        """Whether no request is under way: what is written now does not end up in an answer."""
        return self._syntax is not None and self._begun == self._answered

    @property
    def in_head(self) -> bool:
        """Whether it waits for the rest of a head."""
        return self.idle and self._syntax is not None and self._syntax.in_head

    def data_received(self, data: bytes) -> None:
        """Pass on what has come, unless it is malformed."""
        if self.refused is None and self._follow(data):
            self.handler.data_received(data)

    def _follow(self, data: bytes) -> bool:
        """Whether it is to be passed on; what is wrong with a body is for its reader to find."""
        if (syntax := self._syntax) is None:
            return True
        in_body = syntax.in_body
        try:
            if syntax.feed(data):
                self._begun = syntax.heads
            else:
                self._syntax = None
        except Refused as exc:
            if not in_body:
                self.refused = exc
                return False
            self._syntax = None
        return True

    def answered(self) -> None:
        """A request was answered."""
        self._answered += 1
