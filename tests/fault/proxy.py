"""A TCP proxy before PostgreSQL that knows the moments of a load, and can act at each.

A load is, on its connection: BEGIN, the ledger, COPY, its data, COMMIT, the answer to COMMIT.
Messages are told apart as the PostgreSQL documentation says, "Frontend/Backend Protocol", "Message
Formats": a byte for the type, the length of the rest, the rest; only the very first has no type.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit


class Moment(enum.Enum):
    """Where a load is; the message in question has not passed yet, unless it says so."""

    LEDGER = "the entry into the ledger"
    COPY = "the first data of a COPY"
    COMMIT = "the request to commit"
    SENT = "the request to commit has passed"
    COMMITTED = "the answer to the commit"
    TOLD = "the answer to the commit has passed"


# True lets the message pass, False cuts the connection on both sides
Hook = Callable[[Moment], Awaitable[bool]]


async def _pass(moment: Moment) -> bool:
    return True


@dataclass(slots=True)
class _Link:
    """One connection, and where its load is."""

    client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    server: asyncio.StreamReader
    to_server: asyncio.StreamWriter
    copying: bool = False
    copied: bool = False
    committing: bool = False

    def cut(self) -> None:
        self.to_client.transport.abort()
        self.to_server.transport.abort()


class Proxy:
    """`hook` is asked at each moment of each load; `url` is the way through."""

    def __init__(self, database: str) -> None:
        to = urlsplit(database)
        self._to = to
        self.hook: Hook = _pass
        self.translate: Callable[[str], str] | None = None  # the text of the server's errors
        self.url = ""
        self._links: dict[asyncio.Task[None], _Link] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = (
            f"postgresql://{self._to.username}@127.0.0.1:{port}{self._to.path}"
            "?sslmode=disable&gssencmode=disable"
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

    def let_pass(self) -> None:
        """Act at no moment any more."""
        self.hook = _pass

    async def at(
        self, moment: Moment, act: Callable[[], Awaitable[bool]], timeout_s: float = 20.0
    ) -> None:
        """Act at the next such moment, and at none after it; returns when it is done."""
        begun: asyncio.Future[asyncio.Task[bool]] = asyncio.get_running_loop().create_future()

        async def hook(seen: Moment) -> bool:
            if seen is not moment or self.hook is not hook:
                return True
            self.hook = _pass
            task = asyncio.create_task(_run(act))
            begun.set_result(task)
            return await asyncio.shield(task)  # its own connection may end because of it

        self.hook = hook
        done, _ = await asyncio.wait([begun], timeout=timeout_s)
        assert done, f"no load came to this in {timeout_s} s: {moment.value}"
        await (await begun)

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
            size = await link.client.readexactly(4)
            link.to_server.write(size + await link.client.readexactly(int.from_bytes(size) - 4))
            while True:
                kind, message = await _message(link.client)
                moment = self._moment(link, kind, message)
                if moment is not None and not await self.hook(moment):
                    return
                link.to_server.write(message)
                await link.to_server.drain()
                if moment is Moment.COMMIT and not await self.hook(Moment.SENT):
                    return

    @staticmethod
    def _moment(link: _Link, kind: bytes, message: bytes) -> Moment | None:
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

    async def _answers(self, link: _Link) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, message = await _message(link.server)
                committed = link.committing and kind == b"C"
                if committed and not await self.hook(Moment.COMMITTED):
                    return
                if kind == b"E" and self.translate is not None:
                    text = self.translate(message[5:].decode()).encode()
                    message = kind + (len(text) + 4).to_bytes(4) + text
                link.to_client.write(message)
                await link.to_client.drain()
                if link.committing and kind == b"Z":
                    link.committing = False
                    if not await self.hook(Moment.TOLD):
                        return


async def _run(act: Callable[[], Awaitable[bool]]) -> bool:
    return await act()


async def cut() -> bool:
    """An act: break the connection instead of passing the message on."""
    return False


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The type, and the whole message with it."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(int.from_bytes(head[1:]) - 4)
