"""A TCP proxy before PostgreSQL or MariaDB that knows the moments of a load, and can act at each.

A load is, on its connection: BEGIN, the ledger, COPY, its data, COMMIT, the answer to COMMIT. How
messages are told apart is what the two differ in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from tests.fault.gate import Gate
from tests.fault.moments import Moment, Moments


@dataclass(slots=True)
class _Link:
    """One connection, and where its load is."""

    client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    server: asyncio.StreamReader
    to_server: asyncio.StreamWriter
    loading: bool = False  # asked for a LOAD DATA
    copying: bool = False
    copied: bool = False
    committing: bool = False

    def cut(self) -> None:
        self.to_client.transport.abort()
        self.to_server.transport.abort()


class _Wire(Protocol):
    """How a database and its clients talk.

    Attributes: options: of a URL, without which we can't.
    """

    options: str

    async def first(self, reader: asyncio.StreamReader) -> bytes:
        """The first message of a client."""

    async def message(self, reader: asyncio.StreamReader) -> bytes:
        """Any other, or one of the server."""

    def moment(self, link: _Link, message: bytes) -> Moment | None:
        """At which moment the client sends this."""

    def answers_commit(self, message: bytes) -> bool:
        """Whether what the server sends says that it has committed."""

    def is_ready(self, message: bytes) -> bool:
        """Whether it ends an answer of the server."""


class _PostgresWire:
    """A byte for the type, the length of the rest, the rest; only the very first has no type.

    Source: PostgreSQL documentation, "Frontend/Backend Protocol", "Message Formats".
    """

    options = "?sslmode=disable&gssencmode=disable"

    async def first(self, reader: asyncio.StreamReader) -> bytes:
        size = await reader.readexactly(4)
        return size + await reader.readexactly(int.from_bytes(size) - 4)

    async def message(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(5)
        return head + await reader.readexactly(int.from_bytes(head[1:]) - 4)

    def moment(self, link: _Link, message: bytes) -> Moment | None:
        kind = message[:1]
        if kind == b"d" and not link.copying:
            link.copying = link.copied = True
            return Moment.COPY
        if kind == b"c":
            link.copying = False
        elif kind == b"Q" and message[5:] == b"COMMIT\0" and link.copied:
            link.copied, link.committing = False, True
            return Moment.COMMIT
        elif kind == b"Q" and message[5:].startswith((b"BEGIN", b"ROLLBACK\0")):
            link.copying = link.copied = False
        elif kind == b"Q" and b"INSERT INTO" in message and b"'segment'" in message:
            return Moment.LEDGER
        return None

    def answers_commit(self, message: bytes) -> bool:
        return message[:1] == b"C"

    def is_ready(self, message: bytes) -> bool:
        return message[:1] == b"Z"


class _MariaDBWire:
    """The payload's length in three bytes; a sequence number, 0 for each command; the payload.

    The data of a LOAD DATA LOCAL are the packets of the client that follow its command.
    Source: MariaDB documentation, "Client/Server Protocol".
    """

    options = "?ssl-mode=DISABLED"

    async def first(self, reader: asyncio.StreamReader) -> bytes:
        return await self.message(reader)

    async def message(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(4)
        return head + await reader.readexactly(int.from_bytes(head[:3], "little"))

    def moment(self, link: _Link, message: bytes) -> Moment | None:
        number, payload = message[3], message[4:]
        if number:
            begins = link.loading and bool(payload)
            link.loading &= not begins
            link.copied |= begins
            return Moment.COPY if begins else None
        link.loading = payload.startswith(b"\3LOAD DATA")
        if payload == b"\3COMMIT" and link.copied:
            link.copied, link.committing = False, True
            return Moment.COMMIT
        if payload in (b"\3START TRANSACTION", b"\3ROLLBACK"):
            link.copied = False
        elif payload.startswith(b"\3INSERT INTO") and b"'segment'" in payload:
            return Moment.LEDGER
        return None

    def answers_commit(self, message: bytes) -> bool:
        return message[4:5] == b"\0"

    def is_ready(self, message: bytes) -> bool:
        return True


def moments_of(database: str) -> AbstractAsyncContextManager[Moments]:
    """What tells the moments of loads into this database, as long as the block lasts."""
    return (Gate if database.startswith("sqlite:") else Proxy)(database).running()


class Proxy(Moments):
    """`hook` is asked at each moment of each load; `url` is the way through."""

    def __init__(self, database: str) -> None:
        super().__init__()
        self._to = urlsplit(database)
        self._wire: _Wire = _PostgresWire() if "postgres" in self._to.scheme else _MariaDBWire()
        self.translate: Callable[[str], str] | None = None  # the text of the server's errors
        self._links: dict[asyncio.Task[None], _Link] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = (
            f"{self._to.scheme}://{self._to.username}@127.0.0.1:{port}{self._to.path}"
            f"{self._wire.options}"
        )
        try:
            yield self
        finally:
            server.close()
            for link in self._links.values():
                link.cut()
            await asyncio.gather(*self._links)

    def lead_to(self, database: str) -> None:
        """What connects from now on comes out there; what is connected is cut."""
        self._to = urlsplit(database)
        for link in self._links.values():
            link.cut()

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection(self._to.hostname, self._to.port)
        except OSError:
            to_client.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = link = _Link(client, to_client, server, to_server)
        try:
            await self._both_ways(link)
        finally:
            del self._links[task]

    async def _both_ways(self, link: _Link) -> None:
        ways = [asyncio.create_task(self._requests(link)), asyncio.create_task(self._answers(link))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            link.cut()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _requests(self, link: _Link) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            link.to_server.write(await self._wire.first(link.client))
            while True:
                message = await self._wire.message(link.client)
                moment = self._wire.moment(link, message)
                if moment is not None and not await self.hook(moment):
                    return
                link.to_server.write(message)
                await link.to_server.drain()
                if moment is Moment.COMMIT and not await self.hook(Moment.SENT):
                    return

    async def _answers(self, link: _Link) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                message = await self._wire.message(link.server)
                committed = link.committing and self._wire.answers_commit(message)
                if committed and not await self.hook(Moment.COMMITTED):
                    return
                if self.translate is not None and message[:1] == b"E":
                    text = self.translate(message[5:].decode()).encode()
                    message = b"E" + (len(text) + 4).to_bytes(4) + text
                link.to_client.write(message)
                await link.to_client.drain()
                if link.committing and self._wire.is_ready(message):
                    link.committing = False
                    if not await self.hook(Moment.TOLD):
                        return
