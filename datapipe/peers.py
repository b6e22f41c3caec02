"""Peers: the other processes that share this `data_dir`; together they appear as one.

Each listens on a socket in `data_dir/peers` as well, with the same application behind it. Who can
open the socket could read the journals, too, so a request that comes that way needs no key; and it
is answered for its process alone, so that nobody asks in circles.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from aiohttp import web

_ANSWER_S = 2.0  # a peer that takes longer is left out
_LONGEST_PATH = 100  # bytes; sun_path holds 108 on Linux, 104 elsewhere

log = structlog.stdlib.get_logger("datapipe.peers")


class Peers:
    """Finds the living peers and asks them; none are there with a `data_dir` of one's own."""

    def __init__(self, data_dir: Path, process: str) -> None:
        self._folder = data_dir / "peers"
        self._own = f"{process}.sock"

    @asynccontextmanager
    async def listening(self, runner: web.BaseRunner) -> AsyncIterator[None]:
        """Be found by the others; without it, they only see less."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = self._path(stack)
                await web.UnixSite(runner, path).start()
                stack.callback(_unlink, Path(path))
            except OSError as exc:
                log.warning("peers can't see this process", error=str(exc))
            yield

    def _path(self, stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> str:
        """A path short enough for a socket; where the folder's is not, a link leads there."""
        link = self._folder / self._own
        if len(os.fsencode(link)) <= _LONGEST_PATH:
            return str(link)
        short = tempfile.mkdtemp(prefix="datapipe-")
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        link.symlink_to(Path(short) / "s")
        stack.callback(_unlink, link)
        return str(Path(short) / "s")

    async def ask(self, method: str, path: str) -> list[dict[str, Any]]:
        """The JSON answers of all living peers; what a dead one left behind is removed."""
        if not self._folder.is_dir():
            return []
        others = [p for p in sorted(self._folder.glob("*.sock")) if p.name != self._own]
        if not others:
            return []
        answers = await asyncio.gather(*(self._ask(other, method, path) for other in others))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, socket: Path, method: str, path: str) -> dict[str, Any] | None:
        timeout = aiohttp.ClientTimeout(total=None if method == "POST" else _ANSWER_S)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(_where(socket)), timeout=timeout
                ) as session,
                session.request(method, f"http://peer{path}") as response,
            ):
                answer: dict[str, Any] = await response.json()
                return answer if response.status == 200 else None
        except (aiohttp.ClientConnectorError, FileNotFoundError):
            _unlink(socket)  # nobody listens: its process is gone
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            log.warning("a peer does not answer", error=f"{type(exc).__name__}: {exc}")
        return None


def is_peer(request: web.BaseRequest) -> bool:
    """Whether a request came by the socket of the peers."""
    name = request.transport and request.transport.get_extra_info("sockname")
    return isinstance(name, str | bytes)


def together(own: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One snapshot for all processes: counts are added, what is worst or latest stands."""
    all_of_them = [own, *others]
    lanes: dict[str, Any] = {}
    for each in all_of_them:
        for name, lane in each["lanes"].items():
            lanes[name] = _add(lanes[name], lane) if name in lanes else dict(lane)
    books = {
        key: sum(each["books"][key] for each in all_of_them)
        for key in own["books"]
        if key != "balanced"
    }
    rejected: dict[str, int] = {}
    for each in all_of_them:
        for reason, count in each["rejected"].items():
            rejected[reason] = rejected.get(reason, 0) + count
    return {
        **own,
        "processes": len(all_of_them),
        "uptime_seconds": max(each["uptime_seconds"] for each in all_of_them),
        "books": {**books, "balanced": all(each["books"]["balanced"] for each in all_of_them)},
        "lanes": dict(sorted(lanes.items())),
        "rejected": rejected,
        "mirror": _mirror([each["mirror"] for each in all_of_them]),
        "database": _worst([each["database"] for each in all_of_them]),
    }


_ADDED = (
    "accepted", "recovered", "loaded", "duplicate", "dead", "replayed", "waiting", "in_memory",
    "parked", "waiting_bytes",
)  # fmt: skip


def _add(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """One lane of two processes."""
    loads = [each["last_load"] for each in (one, two) if each["last_load"]]
    nexts = [e["next_load_seconds"] for e in (one, two) if e["next_load_seconds"] is not None]
    return {
        **one,
        **{key: one[key] + two[key] for key in _ADDED},
        "oldest_seconds": max(one["oldest_seconds"], two["oldest_seconds"]),
        "blocked": one["blocked"] or two["blocked"],
        "error": one["error"] or two["error"],
        "last_load": max(loads, key=lambda load: load["at"], default=None),
        "next_load_seconds": min(nexts, default=None),
    }


def _mirror(mirrors: list[Mapping[str, Any]]) -> dict[str, Any]:
    calls: dict[str, int] = {}
    for mirror in mirrors:
        for call, count in mirror["calls"].items():
            calls[call] = calls.get(call, 0) + count
    return {**_worst(mirrors), "requests": sum(calls.values()), "calls": calls}


def _worst(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The first that is down, else our own."""
    return dict(next((state for state in states if not state["up"]), states[0]))


def _where(socket: Path) -> str:
    return str(socket.readlink()) if socket.is_symlink() else str(socket)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
