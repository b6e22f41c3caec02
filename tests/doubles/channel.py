"""The channel of a shared mirror, in memory: what processes in one event loop ask each other.

cluster = Cluster()
create_app(settings, open_mirror=cluster.open)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Set
from contextlib import asynccontextmanager

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors import Answers, Mirror, open_mirror
from datapipe.settings import Settings


class Cluster:
    """Attributes:
    up: whether anybody can be asked.
    frozen: processes that do not answer.
    asked: the questions, and by whom.
    """

    def __init__(self) -> None:
        self.up = True
        self.frozen: set[str] = set()
        self.asked: list[tuple[str, bytes]] = []
        self._answers: dict[str, Callable[[bytes], Awaitable[bytes]]] = {}

    @property
    def processes(self) -> list[str]:
        """All that answer, in the order of their starts."""
        return list(self._answers)

    def channel(self, process: str) -> Channel:
        return Channel(self, process)

    @asynccontextmanager
    async def open(self, settings: Settings, process: str) -> AsyncIterator[Mirror]:
        """The mirror that the settings name, with a channel."""
        async with open_mirror(settings, process) as mirror:
            mirror.channel = self.channel(process)  # type: ignore[misc]
            yield mirror
        self._answers.pop(process, None)


class Channel:
    def __init__(self, cluster: Cluster, process: str) -> None:
        self._cluster = cluster
        self._process = process

    async def answer(self, how: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._cluster._answers[self._process] = how

    async def ask(self, question: bytes, living: Set[str]) -> Answers:
        if not self._cluster.up:
            raise MirrorUnavailable("the cluster is away")
        self._cluster.asked.append((self._process, question))
        heard = {
            process: await how(question)
            for process, how in list(self._cluster._answers.items())
            if process != self._process and process not in self._cluster.frozen
        }
        return Answers(heard, living - heard.keys())
