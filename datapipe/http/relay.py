"""Connections that aiohttp serves: their bytes are passed on, and their syntax is followed.

aiohttp answers a request that it can't parse as plain text, has no time limit for a head, and
reports to nobody when it has answered. So the bytes are followed on their way, by the parser that
judges all heads; a middleware reports what was answered.
"""

from __future__ import annotations

import asyncio

from datapipe.errors import Refused
from datapipe.http.heads import END, Syntax


class Relay:
    """One connection on its way to aiohttp, from the first byte of a request.

    Attributes: refused: why what came last goes no further: it is malformed.
    """

    def __init__(self, handler: asyncio.Protocol, transport: asyncio.Transport) -> None:
        self.handler = handler
        self.refused: Refused | None = None
        self._syntax: Syntax | None = Syntax()  # None: it can't be followed any more
        self._begun = self._answered = 0  # requests
        self._ends = False  # with the last answer
        self._head = b""  # as far as it has come
        self._missing = 0  # bytes of a body whose length is known
        self._last = b""  # the bytes that came before, as many as may begin an END
        handler.connection_made(transport)

    @property
    def idle(self) -> bool:
        """Whether no request is under way: what is written now does not end up in an answer."""
        under_way = self._syntax is None or self._begun != self._answered
        return not under_way and not self._ends

    @property
    def in_head(self) -> bool:
        """Whether it waits for the rest of a head, or for the first."""
        if self._syntax is None or not self.idle:
            return False
        return self._syntax.in_head or not self._syntax.heads

    def data_received(self, data: bytes) -> None:
        """Pass on what has come: heads once they are complete, and nothing malformed."""
        if self.refused is None and (passed := self._follow(data)):
            self.handler.data_received(passed)

    def _follow(self, data: bytes) -> bytes:
        """What is to be passed on.

        It goes from one end of a head or body to the next, so that what is complete before a
        malformed head is not refused with it.
        """
        pieces, at = [], 0
        while at < len(data) and self.refused is None:
            piece = data[at : self._end(data, at)]
            at += len(piece)
            self._head += piece
            if self._feed(piece):
                pieces.append(self._head)
                self._head = b""
        self._last = (self._last + data[-3:])[-3:]
        return b"".join(pieces)

    def _feed(self, piece: bytes) -> bool:
        """Whether it is to be passed on now."""
        if (syntax := self._syntax) is None:
            return True
        in_body = syntax.in_body
        try:
            if not syntax.feed(piece):
                self._syntax = None
        except Refused as exc:
            self.refused = exc.with_traceback(None)  # its frames hold this, in a circle, and data
            self._begun -= in_body  # its answer is the refusal, unless it has one
            return False
        self._missing -= len(piece)
        if syntax.heads > self._begun:
            self._begun, self._missing = syntax.heads, syntax.length
        return not syntax.in_head

    def _end(self, data: bytes, at: int) -> int:
        """Where the head or body that goes on here ends at the latest; chunks end as heads do."""
        if self._syntax is None:
            return len(data)
        if self._missing > 0:
            return min(at + self._missing, len(data))
        if not at and (found := (self._last + data[:3]).find(END)) >= 0:
            return found + len(END) - len(self._last)
        found = data.find(END, at)
        return len(data) if found < 0 else found + len(END)

    def answered(self, keep_alive: bool) -> None:
        """A request was answered; unless the connection is kept, that was the last answer."""
        self._answered += 1
        self._ends = not keep_alive
