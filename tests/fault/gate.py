"""Moments of a load into SQLite: no connection says where it is, so the service itself asks.

An event module asks over TCP, and goes on once it is answered. See `tests.fault.modules.gated`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.fault.moments import Moment, Moments
from tests.service import Service


class Gate(Moments):
    """What a connection that breaks is elsewhere is an error of the disk here."""

    def __init__(self, database: str) -> None:
        super().__init__()
        self.url = database
        self._port = 0

    def service(self, make_service: Callable[..., Service], **settings: Any) -> Service:
        """See `Moments.service`."""
        modules = [*settings.pop("event_modules", ()), "tests.fault.modules.gated"]
        env = {"FAULT_GATE": str(self._port)}
        return super().service(make_service, event_modules=modules, env=env, **settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Gate]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if name := (await reader.readline()).decode().strip():  # or it was killed just now
            writer.write(b"1" if await self.hook(Moment[name]) else b"0")
        writer.close()
