"""Peers: the other processes; together with this one they appear as one.

Each answers for itself alone, so that nobody asks in circles. Those that share a `data_dir` ask
through sockets in it; those that share a mirror, on whatever machines, through its channel. Neither
needs a key: who can open the socket could read the journals, too, and who can use the channel has
the rights of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiohttp
import msgspec
import structlog
from aiohttp import web

from datapipe.errors import MirrorUnavailable
from datapipe.mirrors import Channel

_ANSWER_S = 2.0  # a peer that takes longer is left out
_LATELY_S = 30.0
ENDED_SHOWN_S = 30.0  # how long one that ended is told of
_LONGEST_PATH = 100  # bytes; sun_path holds 108 on Linux, 104 elsewhere
_OBJECT = msgspec.json.Decoder(dict[str, Any])

log = structlog.stdlib.get_logger("datapipe.monitor.peers")


class _Question(msgspec.Struct):
    method: str
    path: str
    query: dict[str, str]


class Heard(NamedTuple):
    """What the others answered: JSON objects.

    Attributes:
        silent: `host:pid` of those that live and did not answer.
        ended: the same of those that answered before, and ended lately without deregistering.
    """

    answers: Sequence[dict[str, Any]] = ()
    silent: Sequence[str] = ()
    ended: Sequence[str] = ()


@dataclass(frozen=True)
class Own:
    """What this process answers the others.

    Attributes:
        status: what it shows of itself; whether with the series of the charts.
        load: load now: one lane or all; whether to accept dead letters.
        service: for commands: `pid`, `address`; with `status`, what it shows of all processes.
    """

    status: Callable[[bool], Awaitable[Mapping[str, Any]]]
    load: Callable[[str | None, bool], Awaitable[Mapping[str, Any]]]
    service: Callable[[bool], Awaitable[Mapping[str, Any]]]

    async def answer(self, method: str, path: str, query: Mapping[str, str]) -> bytes | None:
        """JSON, or None: nobody of this version asks that."""
        if (method, path) == ("GET", "/status.json"):
            return msgspec.json.encode(await self.status(query.get("history") != "no"))
        if (method, path) == ("GET", "/service.json"):
            return msgspec.json.encode(await self.service(query.get("status") == "yes"))
        if (method, path) == ("POST", "/load"):
            accept_dead = query.get("accept") == "dead"
            return msgspec.json.encode(await self.load(query.get("lane"), accept_dead))
        return None


class Peers(Protocol):
    """A way to reach the others."""

    def listening(self, own: Own) -> AbstractAsyncContextManager[None]:
        """Answer the others in the block; where that can't be, they only see less."""

    async def ask(self, method: str, path: str, query: Mapping[str, str]) -> Heard:
        """Ask all others; each does, and tells of, its own part."""


class Others:
    """What the others last said of themselves.

    Attributes:
        answers, silent, ended: see `Heard`.
        histories: the series of their charts, when they were last asked for.
        at: when that was, by the monotonic clock.
    """

    def __init__(self, peers: Peers) -> None:
        self.answers, self.silent, self.ended = Heard()
        self.histories: Sequence[Mapping[str, Any]] = ()
        self.at = -math.inf
        self._peers = peers
        self._asking = asyncio.Lock()
        self._asked = 0  # how many times
        self._answered = {True: 0, False: 0}  # the last that they were, with histories and without

    async def refresh(self, *, history: bool) -> None:
        """Ask them anew; the series of the charts are most of an answer.

        However many want it, one question is under way; those who come meanwhile share the next.
        """
        asked = self._asked
        async with self._asking:
            answered = self._answered[True] if history else max(self._answered.values())
            if answered <= asked:
                self._asked = question = self._asked + 1
                query = {} if history else {"history": "no"}
                heard = await self._peers.ask("GET", "/status.json", query)
                self.answers, self.silent, self.ended = heard
                if history:
                    self.histories = [each["history"] for each in self.answers]
                self.at = time.monotonic()
                self._answered[history] = question

    @property
    def silent_lately(self) -> bool:
        """Whether any is; not for ever, so that "since" begins anew where nobody has asked."""
        return bool(self.silent) and self._lately

    @property
    def ended_lately(self) -> bool:
        return bool(self.ended) and self._lately

    @property
    def _lately(self) -> bool:
        return time.monotonic() - self.at < _LATELY_S


class LocalPeers:
    """Those that share our `data_dir`; each listens on a socket in `data_dir/peers`.

    One that is too slow is left out, and logged. The socket of one that was killed stays for a
    while, so that all who knew it notice.
    """

    def __init__(self, data_dir: Path, process: str, answer_s: float = _ANSWER_S) -> None:
        self._folder = data_dir / "peers"
        self._own = f"{process}.sock"
        self._answer_s = answer_s
        self._hosts: dict[str, str] = {}  # of those that have answered, by name
        self._deserted: dict[str, float] = {}  # since when nobody listens there, by name

    @asynccontextmanager
    async def listening(self, own: Own) -> AsyncIterator[None]:
        """See `Peers.listening`."""

        async def answer(request: web.Request) -> web.Response:
            body = await own.answer(request.method, request.path, request.query)
            if body is None:
                raise web.HTTPNotFound
            return web.Response(body=body, content_type="application/json")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(runner.cleanup)
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = self._path(stack)
                await web.UnixSite(runner, path).start()
                stack.callback(_unlink, Path(path))
            except OSError as exc:
                log.warning("peers can't see this process", error=str(exc))
            yield

    def _path(self, stack: contextlib.AsyncExitStack) -> str:
        """A path short enough for a socket; where the folder's is not, a link leads there."""
        link = self._folder / self._own
        if len(os.fsencode(link)) <= _LONGEST_PATH:
            return str(link)
        short = tempfile.mkdtemp(prefix="datapipe-")
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        link.symlink_to(Path(short) / "s")
        stack.callback(_unlink, link)
        return str(Path(short) / "s")

    async def ask(self, method: str, path: str, query: Mapping[str, str]) -> Heard:
        """See `Peers.ask`; what one that ended has left behind is removed in the end."""
        try:
            others = [p for p in sorted(self._folder.glob("*.sock")) if p.name != self._own]
            self._forget(others)
        except OSError as exc:  # no open file is left
            log.warning("a peer does not answer", error=str(exc))
            return Heard()
        answers = await asyncio.gather(*(self._ask(other, method, path, query) for other in others))
        ended = [self._hosts[name] for name in self._deserted if name in self._hosts]
        return Heard([answer for answer in answers if answer is not None], ended=ended)

    def _forget(self, others: Sequence[Path]) -> None:
        """Those that are gone, and those that ended some time ago, with their sockets."""
        until = time.monotonic() - ENDED_SHOWN_S
        there = {path.name for path in others}
        for name in (self._hosts.keys() | self._deserted.keys()) - there:
            self._hosts.pop(name, None)
            self._deserted.pop(name, None)
        for name in [name for name, since in self._deserted.items() if since < until]:
            _unlink(self._folder / name)
            del self._deserted[name]
            self._hosts.pop(name, None)

    async def _ask(
        self, socket: Path, method: str, path: str, query: Mapping[str, str]
    ) -> dict[str, Any] | None:
        timeout = aiohttp.ClientTimeout(total=None if method == "POST" else self._answer_s)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(_where(socket)), timeout=timeout
                ) as session,
                session.request(method, f"http://peer{path}", params=query) as response,
            ):
                if response.status != 200:
                    return None
                answer = _OBJECT.decode(await response.read())
                self._hosts[socket.name] = str(answer.get("host", self._hosts.get(socket.name)))
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as exc:
            cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
            if isinstance(cause, ConnectionRefusedError | FileNotFoundError):
                self._deserted.setdefault(socket.name, time.monotonic())
                return None
            log.warning("a peer does not answer", error=f"{type(exc).__name__}: {exc}")
        return None


async def services(data_dir: Path, *, status: bool = False) -> Sequence[dict[str, Any]]:
    """For commands: what the processes that run with this `data_dir` say of themselves.

    Each its `pid` and `address` (None: somebody else listens for it); with `status`, what all of
    them together show.
    """
    # each may have to wait for another
    peers = LocalPeers(data_dir, "", 2 * _ANSWER_S)
    found = await peers.ask("GET", "/service.json", {"status": "yes"} if status else {})
    return sorted(found.answers, key=lambda service: int(service["pid"]))


class ClusterPeers:
    """Those that share our mirror, wherever they run.

    Args: living: `host:pid` of the others that live, by their ids.
    """

    def __init__(self, channel: Channel, living: Callable[[], Mapping[str, str]]) -> None:
        self._channel = channel
        self._living = living

    @asynccontextmanager
    async def listening(self, own: Own) -> AsyncIterator[None]:
        """See `Peers.listening`."""

        async def answer(question: bytes) -> bytes:
            try:
                asked = msgspec.json.decode(question, type=_Question)
            except msgspec.MsgspecError:  # of another version
                return b""
            return await own.answer(asked.method, asked.path, asked.query) or b""

        await self._channel.answer(answer)
        yield

    async def ask(self, method: str, path: str, query: Mapping[str, str]) -> Heard:
        """See `Peers.ask`; all are silent while the cluster can't be reached."""
        living = self._living()
        question = msgspec.json.encode(_Question(method, path, dict(query)))
        try:
            heard = await self._channel.ask(question, living.keys())
        except MirrorUnavailable:  # the mirror's own health says why
            return Heard((), sorted(living.values()))
        answers, silent = [], set(heard.silent)
        for id, answer in sorted(heard.by_process.items()):
            try:
                answers.append(_OBJECT.decode(answer))
            except msgspec.MsgspecError as exc:
                log.warning("a peer does not answer", error=f"{type(exc).__name__}: {exc}")
                silent.add(id)
        return Heard(answers, sorted(living.get(id, id) for id in silent))


def _where(socket: Path) -> str:
    return str(socket.readlink()) if socket.is_symlink() else str(socket)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
