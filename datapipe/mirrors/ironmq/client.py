"""IronMQ v3 over HTTP: the calls that the mirror needs, and no more.

Source: IronMQ v3 API reference. What the reference leaves open is treated as the worst case: a
bulk delete with an empty list may clear the queue, so it is never sent; a post may be stored
without an answer, so what is posted must bear its own id.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import aiohttp

from datapipe.errors import MirrorUnavailable
from datapipe.health import Health
from datapipe.retry import backoff
from datapipe.settings import Settings

REQUEST_MAX_BYTES = 65_536  # the whole request, on the smaller plans
DELETE_MAX_IDS = 100
MESSAGES_AT_ONCE = 100  # the most that one reserve or peek gives
EXPIRATION_S = 2_592_000  # 30 days, the longest there is
CONNECTIONS = 16
_RETRY_MAX_S = 5.0
_JUDGED_AS_A_WHOLE = ("create", "post")  # the calls of an append, by who appends
_HEAD_BYTES = 1_024  # of a request's head, beside its path and the token; more than aiohttp sends

_T = TypeVar("_T")


class Message(NamedTuple):
    """One message as reserve, get or peek give it; without a lease `reservation_id` is None."""

    id: str
    body: str
    reservation_id: str | None = None


class CallRefused(MirrorUnavailable):
    """IronMQ answered with `http_status`, which a retry does not change."""

    def __init__(self, http_status: int, detail: str) -> None:
        super().__init__(detail)
        self.http_status = http_status


class _Again(Exception):
    """A retry may help."""


class Client:
    """One project at one host. Every call raises MirrorUnavailable after `mirror_timeout`.

    Attributes:
        calls: requests sent so far, by kind.
        health: whether IronMQ works, by the outcome of each call, and of each append.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: Settings) -> None:
        host = settings.ironmq_host
        base = host if "://" in host else f"https://{host}"
        self._base = f"{base.rstrip('/')}/3/projects/{quote(settings.ironmq_project_id, safe='')}"
        self._token = settings.ironmq_token
        self._session = session
        self._timeout_s = settings.mirror_timeout
        self._made: dict[str, asyncio.Task[None]] = {}  # queues, by name
        self.calls: Counter[str] = Counter()
        self.health = Health(up=True)

    async def make_queue(self, queue: str) -> None:
        """Make the queue, once, or have its messages live 30 days where it is there already.

        Those that ask meanwhile wait for the one call.
        """
        made = self._made.get(queue)
        if made is None or (made.done() and (made.cancelled() or made.exception())):
            body = {"queue": {"message_expiration": EXPIRATION_S}}
            call = self._call("create", "PUT", f"/queues/{_name(queue)}", _nothing, body)
            made = self._made[queue] = asyncio.create_task(call)
        await asyncio.shield(made)

    async def queues(self, prefix: str) -> list[str]:
        """Names of all queues with this prefix, sorted.

        Raises: CallRefused: 404: no such project, or there is nothing in it yet.
        """
        names: list[str] = []
        while True:
            query = f"?per_page=100&prefix={quote(prefix, safe='')}"
            if names:
                query += f"&previous={_name(names[-1])}"
            page = await self._call("list", "GET", f"/queues{query}", _names)
            names += page
            if len(page) < 100:
                return names

    async def size(self, queue: str) -> int | None:
        """How many messages the queue holds, in any state, or None: there is no such queue."""
        return await self._call("info", "GET", f"/queues/{_name(queue)}", _size, absent=True)

    def room(self, queue: str) -> int:
        """Bytes that the content of one post may have, so that the whole request fits."""
        return REQUEST_MAX_BYTES - _HEAD_BYTES - len(self._base + _name(queue) + self._token)

    async def post(self, queue: str, content: bytes) -> str:
        """Put one message on the queue; its id. It may be stored though no answer comes.

        Args: content: from `encode_post`.
        """
        path = f"/queues/{_name(queue)}/messages"
        return await self._call("post", "POST", path, lambda answer: str(answer["ids"][0]), content)

    async def reserve(self, queue: str, count: int, lease_s: int) -> list[Message]:
        """Take up to `count` (at most 100) messages for `lease_s` seconds, oldest first."""
        content = {"n": count, "timeout": lease_s, "wait": 0}
        path = f"/queues/{_name(queue)}/reservations"
        return await self._call(
            "reserve", "POST", path, _reserved, content, absent=True, repeat=False
        )

    async def peek(self, queue: str, count: int) -> list[Message]:
        """Look at up to `count` (at most 100) messages, oldest first, without taking them."""
        path = f"/queues/{_name(queue)}/messages?n={count}"
        return await self._call("peek", "GET", path, _messages, absent=True)

    async def get(self, queue: str, id: str) -> Message | None:
        """One message by its id, or None: it is missing."""
        path = _message_path(queue, id)
        return await self._call("get", "GET", path, _one_message, absent=True)

    async def delete(self, queue: str, entries: Sequence[tuple[str, str | None]]) -> set[str]:
        """Delete messages by id and, where we hold one, reservation id. Absent ones are done.

        Returns: ids of those that are reserved under an id that we don't know: by somebody else, or
        by us in a call whose answer was lost. They stay, and come back when that lease ends.
        """
        refused: set[str] = set()
        path = f"/queues/{_name(queue)}/messages"
        for at in range(0, len(entries), DELETE_MAX_IDS):
            some = entries[at : at + DELETE_MAX_IDS]
            content = {"ids": [{"id": id, **_lease(reservation)} for id, reservation in some]}
            try:
                await self._call("delete", "DELETE", path, _nothing, content)
            except CallRefused as exc:
                if exc.http_status not in (403, 404):
                    raise
                # the reference does not say what a bad entry does to the others
                for id, reservation in some:
                    if not await self._delete_one(queue, id, reservation):
                        refused.add(id)
        return refused

    async def _delete_one(self, queue: str, id: str, reservation: str | None) -> bool:
        """Delete a message; whether it is deleted."""
        path = _message_path(queue, id)
        try:
            await self._call("delete", "DELETE", path, _nothing, _lease(reservation), absent=True)
        except CallRefused as exc:
            if exc.http_status != 403:
                raise
            if reservation is None:
                return False
            return await self._delete_one(queue, id, None)  # expired, unless somebody has it now
        return True

    async def touch(self, queue: str, id: str, reservation: str, lease_s: int) -> str:
        """Prolong a lease; its new reservation id. Raises: CallRefused: 403 or 404: it is lost."""
        path = f"{_message_path(queue, id)}/touch"
        content = {"reservation_id": reservation, "timeout": lease_s}
        return await self._call(
            "touch", "POST", path, lambda answer: str(answer["reservation_id"]), content
        )

    async def release(self, queue: str, id: str, reservation: str) -> None:
        """Give a reserved message back at once; one whose lease is lost is given back already."""
        path = f"{_message_path(queue, id)}/release"
        content = {"reservation_id": reservation, "delay": 0}
        try:
            await self._call("release", "POST", path, _nothing, content, absent=True)
        except CallRefused as exc:
            if exc.http_status != 403:
                raise

    async def _call(
        self,
        kind: str,
        method: str,
        path: str,
        pick: Callable[[dict[str, Any]], _T],
        content: Mapping[str, Any] | bytes | None = None,
        *,
        absent: bool = False,
        repeat: bool = True,
    ) -> _T:
        """One call, repeated while that may help.

        Args:
            pick: gives what is wanted of an answer.
            absent: 404 is an answer: an empty one.
        """
        began = time.perf_counter()
        data = json.dumps(content).encode() if isinstance(content, Mapping) else content
        try:
            answer = await self._repeated(kind, method, path, data, absent, repeat)
            picked = _picked(pick, answer)
        except MirrorUnavailable as exc:
            refused = isinstance(exc, CallRefused) and exc.http_status != 401
            if kind not in _JUDGED_AS_A_WHOLE and not refused:
                self.health.fails(began, exc.detail)
            raise
        if kind not in _JUDGED_AS_A_WHOLE:
            self.health.works(time.perf_counter())  # its answer is of now
        return picked

    async def _repeated(
        self, kind: str, method: str, path: str, data: bytes | None, absent: bool, repeat: bool
    ) -> dict[str, Any]:
        why = f"IronMQ does not answer within {self._timeout_s:g} s"
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                for failures in itertools.count(1):
                    try:
                        return await self._once(kind, method, path, data, absent)
                    except _Again as exc:
                        why = str(exc)
                    if not repeat:
                        break
                    await asyncio.sleep(backoff(failures, _RETRY_MAX_S))
        raise MirrorUnavailable(why)

    async def _once(
        self, kind: str, method: str, path: str, data: bytes | None, absent: bool
    ) -> dict[str, Any]:
        self.calls[kind] += 1
        headers = {"Authorization": f"OAuth {self._token}"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with self._session.request(
                method, self._base + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                text = await response.read()
        except (aiohttp.ClientError, OSError) as exc:
            raise _Again(f"IronMQ can't be reached: {type(exc).__name__}") from None
        if response.status == 404 and absent:
            return {}
        if response.status in (408, 429) or response.status >= 500:
            raise _Again(f"IronMQ answers {response.status}")
        if response.status >= 400:
            raise CallRefused(response.status, self._refusal(response.status, text))
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _Again(f"IronMQ answers {response.status} and no JSON object")
        return answer

    def _refusal(self, status: int, text: bytes) -> str:
        """What IronMQ says, in a line; never what was sent, which holds the token."""
        if status == 401:
            return "IronMQ refuses us: wrong credentials (ironmq_token, ironmq_project_id)"
        try:
            said = str(json.loads(text)["msg"])
        except (ValueError, KeyError, TypeError):
            said = "no reason"
        return f"IronMQ refuses us: {status} {said.replace(self._token, '***')[:200]}"


def encode_post(body: str) -> bytes:
    """The content of a post of one message."""
    return json.dumps({"messages": [{"body": body}]}).encode()


def _name(text: str) -> str:
    return quote(text, safe="")


def _message_path(queue: str, id: str) -> str:
    return f"/queues/{_name(queue)}/messages/{_name(id)}"


def _lease(reservation: str | None) -> dict[str, str]:
    return {"reservation_id": reservation} if reservation else {}


# --- what is wanted of an answer ---


def _picked(pick: Callable[[dict[str, Any]], _T], answer: dict[str, Any]) -> _T:
    """Raises: MirrorUnavailable: it is not there."""
    try:
        return pick(answer)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise MirrorUnavailable("IronMQ's answer is not what was asked for") from None


def _nothing(answer: dict[str, Any]) -> None:
    return None


def _names(answer: dict[str, Any]) -> list[str]:
    return [str(entry["name"]) for entry in answer["queues"] or ()]


def _size(answer: dict[str, Any]) -> int | None:
    return int(answer["queue"]["size"]) if answer else None


def _message(raw: dict[str, Any]) -> Message:
    return Message(str(raw["id"]), str(raw.get("body") or ""), raw.get("reservation_id"))


def _one_message(answer: dict[str, Any]) -> Message | None:
    return _message(answer["message"]) if answer else None


def _messages(answer: dict[str, Any]) -> list[Message]:
    return [_message(raw) for raw in answer.get("messages") or ()]


def _reserved(answer: dict[str, Any]) -> list[Message]:
    messages = _messages(answer)
    if not all(message.reservation_id for message in messages):
        raise LookupError("reservation_id")
    return messages
