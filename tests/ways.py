"""The two ways in, side by side: what datapipe serves itself, and what it hands over to aiohttp.

Both are whole services in this process and loop. One takes plain heads for what they are, the other
finds none plain, so that aiohttp serves each of its connections.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

from datapipe.app import PIPELINE, Pipeline, create_app, create_runner
from datapipe.http.heads import Heads
from datapipe.http.runner import Runner
from datapipe.settings import Settings
from tests.doubles.memory_database import MemoryDatabase
from tests.wire import post

LINGER_S = 0.3  # 3 s would be long, for so many tests
PROBE = post(
    b'{"event_name": "install", "user_id": 1, "timestamp": 1}', "X-Request-ID: probe",
    "Authorization: Bearer key",
)  # fmt: skip
_PROBED = re.compile(rb"X-Request-ID: probe\r\n(?:[^\r]+\r\n)*\r\n")
_LENGTH = re.compile(rb"(?i)content-length: (\d+)")
_DATE = re.compile(rb"Date: [^\r]+ GMT\r\n")
_NEW_ID = re.compile(rb"\b[0-9a-f]{16}\b")
_HEAD = re.compile(rb"(HTTP/1\.[01] \d{3} [^\r]*\r\n)((?:[^\r:]+: ?[^\r]*\r\n)+)\r\n")
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")

Step = bytes | float | str


class NothingPlain(Heads):
    """Finds no head plain."""

    def read(self, head: bytes) -> None:
        super().read(head)


class _Plain(Runner):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"lingering_time": LINGER_S})


class _HandedOver(_Plain):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads = NothingPlain()


KINDS = {"plain": _Plain, "aiohttp": _HandedOver}


class Talk(NamedTuple):
    """What came of the bytes of one connection.

    Attributes:
        answers: all of them, less what differs each time; headers in order of their names.
        open: whether the connection was kept.
        counted: accepted events by lane, rejected ones by reason.
    """

    answers: bytes
    open: bool
    counted: dict[str, int]

    @property
    def statuses(self) -> str:
        """As text; with `x` behind them if the connection was closed."""
        found = [status.decode() for status in STATUS.findall(self.answers)]
        return " ".join([*found, *([] if self.open else ["x"])])


class Way:
    """One service. Attributes: database: where it loads."""

    def __init__(self, runner: Runner, database: MemoryDatabase) -> None:
        self.runner = runner
        self.database = database
        self.pipeline: Pipeline = runner.app[PIPELINE]
        self.port: int = runner.addresses[0][1]

    @property
    def counted(self) -> Counter[str]:
        counted = Counter(self.pipeline.status.records.rejected)
        for name, lane in self.pipeline.buffer.lanes.items():
            counted[name] += lane.accepted
        return counted

    @property
    def quiet(self) -> bool:
        """Whether no request is under way."""
        return not self.pipeline.ingest.admission.requests

    async def talk(self, steps: Sequence[Step], *, probe: bool = True) -> Talk:
        """Send pieces of bytes, and read until all is answered.

        Args:
            steps: bytes are sent in one piece, a number waits so many seconds, "leave" closes.
            probe: ask behind them with a request of our own, whose answer is not among the answers;
                else read until the end.
        """
        before = self.counted
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        reading = asyncio.create_task(_read(reader))
        try:
            for step in steps:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif step == "leave":
                    writer.transport.abort()
                elif isinstance(step, bytes) and not writer.transport.is_closing():
                    await _send(writer, step)
            if probe and not writer.transport.is_closing():
                await _send(writer, PROBE)
            async with asyncio.timeout(20):
                answers, is_open = await reading
                while not self.quiet:
                    await asyncio.sleep(0.01)
        finally:
            reading.cancel()
            writer.transport.abort()
        counted = self.counted
        counted.subtract(before)
        return Talk(normalized(answers), is_open, {k: n for k, n in counted.items() if n})


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Returns once the service has read it, as far as it reads at all."""
    writer.write(data)
    for _ in range(4 + len(data) // 65_536):
        await asyncio.sleep(0)


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """What came before the end, or before the answer to the probe; whether there was one."""
    data = b""
    try:
        while more := await reader.read(65_536):
            data += more
            if probed := _PROBED.search(data):
                start = data.rindex(b"HTTP/1.1 ", 0, probed.start())
                length = _LENGTH.search(data, start)
                assert length, data[start:]
                if len(data) >= probed.end() + int(length[1]):
                    return data[:start], True
    except ConnectionError:
        pass
    return data, False


def normalized(answers: bytes) -> bytes:
    """Answers without their dates and new request ids, their headers in order."""

    def ordered(head: re.Match[bytes]) -> bytes:
        return head[1] + b"".join(sorted(head[2].splitlines(keepends=True))) + b"\r\n"

    return _NEW_ID.sub(b"<id>", _HEAD.sub(ordered, _DATE.sub(b"", answers)))


@asynccontextmanager
async def both_ways(folder: Path, **settings: Any) -> AsyncIterator[dict[str, Way]]:
    """Two services of the same settings, each with its own journal and database."""
    async with (
        one_way("plain", folder, **settings) as plain,
        one_way("aiohttp", folder, **settings) as other,
    ):
        yield {"plain": plain, "aiohttp": other}


@asynccontextmanager
async def one_way(
    kind: str, folder: Path, database: MemoryDatabase | None = None, **settings: Any
) -> AsyncIterator[Way]:
    given = {"data_dir": str(folder / kind), "load_interval": 3600, "host": "127.0.0.1"}
    database = database or MemoryDatabase()
    app = create_app(Settings(**given | settings), open_sink=database.open)
    runner = create_runner(app, KINDS[kind])
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Way(runner, database)
    finally:
        await runner.cleanup()
