"""A TCP proxy that knows nothing of what passes: it can be slow, and it can break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Pipe:
    """Attributes: port: the way in, on loopback. delay_s: of whatever passes, on each way."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self._to = host, port
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def running(cls, host: str, port: int) -> AsyncIterator[Pipe]:
        pipe = cls(host, port)
        server = await asyncio.start_server(pipe._accept, "127.0.0.1", 0)
        pipe.port = server.sockets[0].getsockname()[1]
        try:
            yield pipe
        finally:
            server.close()
            pipe.cut()
            await asyncio.gather(*pipe._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections; new ones can be made."""
        for end in self._ends:
            end.transport.abort()

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = {to_client}
        self._ends.add(to_client)
        try:
            with suppress(OSError):
                server, to_server = await asyncio.open_connection(*self._to)
                ends.add(to_server)
                self._ends.add(to_server)
                ways = [self._pass(client, to_server), self._pass(server, to_client)]
                tasks = [asyncio.create_task(way) for way in ways]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in tasks:
                        each.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for end in ends:
                end.transport.abort()
            self._ends -= ends
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
