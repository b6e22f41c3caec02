"""What many HTTP tests need: raw HTTP/1.1 over a socket, events to post, a service for a module."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.service import Service

# settings for each way in: plain heads are served by datapipe itself, or all by aiohttp
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "aiohttp": {"event_modules": ["tests.fault.modules.nothing_plain"]},
}


class Answer(NamedTuple):
    """One HTTP answer; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> int:
        """The `status_code` of an answer that has all an answer must have."""
        assert self.headers["content-type"].startswith("application/json"), self
        assert self.headers.get("x-request-id"), self
        assert isinstance(self.json["status_message"], str)
        assert self.json["status_message"], self
        return int(self.json["status_code"])


class Wire:
    """One connection, told byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, timeout_s: float = 15.0, *, method: str = "POST") -> Answer:
        """The next final answer; 1xx ones are passed over."""
        async with asyncio.timeout(timeout_s):
            while True:
                answer = await self._answer(method)
                if answer.status >= 200:
                    return answer

    async def interim(self, timeout_s: float = 15.0) -> int:
        """The status of the next answer, which has no body."""
        async with asyncio.timeout(timeout_s):
            return (await self._answer("HEAD")).status

    async def _answer(self, method: str) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split()[1])
        pairs = (line.split(":", 1) for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, value in pairs}
        length = 0 if method == "HEAD" or status < 200 else int(headers.get("content-length", 0))
        return Answer(status, headers, await self._reader.readexactly(length))

    async def ended(self, timeout_s: float = 15.0) -> bytes:
        """What still comes until the server closes."""
        async with asyncio.timeout(timeout_s):
            try:
                return await self._reader.read()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def wire(service: Service) -> AsyncIterator[Wire]:
    """A connection to the service."""
    url = urllib.parse.urlsplit(service.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


async def ask(service: Service, request: bytes, *, method: str = "POST") -> Answer:
    """The answer to one raw request on a connection of its own."""
    async with wire(service) as line:
        await line.send(request)
        return await line.answer(method=method)


def post(body: bytes, *headers: str, target: str = "/", version: str = "1.1") -> bytes:
    """A raw POST; its length is told unless the headers say how the body comes."""
    lines = [f"POST {target} HTTP/{version}", "Host: localhost", *headers]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str) -> bytes:
    """A raw GET."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def crash(message: str = "m", user_id: int = 1, **more: object) -> dict[str, Any]:
    """A good `crash_report`."""
    event = {"event_name": "crash_report", "user_id": user_id, "timestamp": 1000}
    return {**event, "message": message, **more}


def purchase(sku: str = "s", user_id: int = 1, **more: object) -> dict[str, Any]:
    """A good `purchase`."""
    return {"event_name": "purchase", "user_id": user_id, "timestamp": 1000, "sku": sku, **more}


def lines(*events: object) -> bytes:
    """NDJSON; bytes are lines as they are."""
    return b"".join(
        (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n"
        for event in events
    )


@asynccontextmanager
async def running(
    folder: Path, env: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[Service]:
    """A service that loads only when asked to, unless the settings say otherwise."""
    service = Service(folder, env, **{"load_interval": 3600, "load_min_interval": 0, **settings})
    try:
        yield await service.start()
    finally:
        await service.kill()
