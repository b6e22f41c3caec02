"""The NATS mirror as tests open it: over real servers, without a service around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column
from datapipe.mirrors.nats.mirror import Nats, open_nats
from datapipe.settings import Settings
from datapipe.sinks import Mark
from tests.jetstream import NatsCluster, request

COLUMNS = (Column("n", "bigint"),)


class Members:
    """The rest of the service, for a mirror: the database's mark and clock; it forgets `before`.

    Args: id: of the mark, not confirmed; None: there is none.
    """

    def __init__(self, id: str | None = "one", clock: Callable[[], float] = time.time) -> None:
        self.found = Mark(id) if id else None
        self.clock = clock
        self.forgotten: list[tuple[str, float]] = []
        self.unregistered: set[str] = set()

    def is_dead(self, process: str) -> bool:
        raise AssertionError

    def can_load(self, lane: str) -> bool:
        return lane not in self.unregistered

    async def loaded(self, segments: Sequence[str]) -> set[str]:
        raise AssertionError

    async def expire_source(self, source: str) -> None:
        raise AssertionError

    async def expire_lanes(self, source: str, before: Mapping[str, float]) -> None:
        self.forgotten += before.items()

    async def database_time(self) -> float:
        return self.clock()

    async def find_mark(self, prefix: str) -> Mark | None:
        return self.found

    async def mark(self, prefix: str) -> Mark:
        self.found = self.found or Mark(uuid4().hex)
        return self.found

    async def confirm_mark(self, prefix: str, id: str) -> None:
        if self.found and self.found.id == id:
            self.found = Mark(id, confirmed=True)


def settings_of(cluster: NatsCluster, prefix: str, **more: Any) -> Settings:
    wanted = {"nats_prefix": prefix, "nats_lane_max_bytes": 16 << 20, **cluster.settings, **more}
    return Settings(**wanted)


@asynccontextmanager
async def opened(
    cluster: NatsCluster, prefix: str, process: str = "one", **more: Any
) -> AsyncIterator[Nats]:
    """A mirror that knows whose database its streams are."""
    async with open_nats(settings_of(cluster, prefix, **more), process) as mirror:
        members = Members()
        async with asyncio.timeout(20):
            while not members.found or not members.found.confirmed:
                with suppress(MirrorUnavailable):  # servers that have just started are slow
                    await mirror.recover(members)
        yield mirror


def segment(number: int, lane: str = "install", size: int = 20, rows: int = 1) -> Segment:
    """Args: size: bytes of a row."""
    data = b"".join(b"%0*d\n" % (size - 1, number * rows + row) for row in range(rows))
    return Segment(lane, COLUMNS, data, rows, neutral=True)


def keyed(parts: int, size: int, lane: str = "install") -> Segment:
    """One of `parts` parts of a POST with a key, each of ten rows and `size` bytes."""
    made = segment(0, lane, size // 10, parts * 10)
    made.parts = tuple(
        Part("claim", "body", number, number * size, (number + 1) * size, 10)
        for number in range(parts)
    )
    return made


def ids(segments: Sequence[Segment]) -> list[str]:
    return [each.id for each in segments]


async def store(mirror: Nats, *segments: Segment) -> None:
    appended = await mirror.append(segments)
    assert appended.error is None, appended.error
    assert ids(appended.stored) == ids(segments)


async def take_until(mirror: Nats, count: int, lane: str = "install") -> list[Segment]:
    """Take again and again until there are so many."""
    taken: list[Segment] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken += await mirror.take(lane, 1_000_000)
            await asyncio.sleep(0.02)
    assert len(taken) == count
    return taken


async def info(cluster: NatsCluster, prefix: str, lane: str = "install") -> dict[str, Any]:
    """What the servers say of the lane's stream."""
    async with cluster.client() as client:
        return await request(client, f"STREAM.INFO.{prefix}_{lane}", {})


async def messages(cluster: NatsCluster, prefix: str, lane: str = "install") -> int:
    found: int = (await info(cluster, prefix, lane))["state"]["messages"]
    return found


async def has(cluster: NatsCluster, prefix: str, count: int, lane: str = "install") -> bool:
    """Whether so many messages are there; what was acknowledged is removed a little later."""
    return await messages(cluster, prefix, lane) == count


class Tap:
    """A TCP proxy; while `answers` is not set, what the server says is held back."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self.answers = asyncio.Event()
        self.answers.set()
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Tap]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            self.answers.set()

    def cut(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(self._to.hostname, self._to.port)
        writers = {to_client, to_server}
        self._writers |= writers
        with suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.wait(
                [
                    asyncio.create_task(self._pass(client, to_server, None)),
                    asyncio.create_task(self._pass(server, to_client, self.answers)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        self._writers -= writers
        for writer in writers:
            writer.transport.abort()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        allowed: asyncio.Event | None,
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if allowed is not None:
                    await allowed.wait()
                writer.write(data)
                await writer.drain()
