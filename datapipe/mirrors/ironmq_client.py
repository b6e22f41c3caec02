"""IronMQ v3 over HTTP: the calls that the mirror needs, and no more.

Source: IronMQ v3 API reference. What the reference leaves open is treated as the worst case: a
bulk delete with an empty list may clear the queue, so it is never sent; a post may be stored
without an answer, so what is posted must bear its own id.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import tenacity

from datapipe.errors import MirrorUnavailable
from datapipe.settings import Settings

REQUEST_MAX_BYTES = 65_536  # the whole request, on the smaller plans
DELETE_MAX_IDS = 100
EXPIRATION_S = 2_592_000  # 30 days, the longest there is
CONNECTIONS = 16


class Message(NamedTuple):
    """One message as reserve, get or peek give it; without a lease `reservation_id` is None."""

    id: str
    body: str
    reservation_id: str | None = None


class Refused(MirrorUnavailable):
    """IronMQ answered with a status that a repeat does not change."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Again(Exception):
    """A repeat may help."""


class Client:
    """One project at one host. Every call raises MirrorUnavailable after `timeout_s` seconds.

    Attributes: calls: requests sent so far, by kind.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: Settings) -> None:
        host = settings.ironmq_host
        base = host if "://" in host else f"https://{host}"
        self._base = f"{base.rstrip('/')}/3/projects/{quote(settings.ironmq_project_id, safe='')}"
        self._headers = {"Authorization": f"OAuth {settings.ironmq_token}"}
        self._session = session
        self._timeout_s = settings.mirror_timeout
        self.calls: Counter[str] = Counter()

    async def create_queue(self, queue: str) -> None:
        """Make the queue, or have its messages live 30 days where it is there already."""
        body = {"queue": {"message_expiration": EXPIRATION_S}}
        await self._call("create", "PUT", f"/queues/{_name(queue)}", body)

    async def queues(self, prefix: str) -> list[str]:
        """Names of all queues with this prefix, sorted."""
        names: list[str] = []
        while True:
            query = f"?per_page=100&prefix={quote(prefix, safe='')}"
            if names:
                query += f"&previous={_name(names[-1])}"
            answer = await self._call("list", "GET", f"/queues{query}")
            page = [entry["name"] for entry in (answer or {}).get("queues") or ()]
            names += page
            if len(page) < 100:
                return names

    async def info(self, queue: str) -> dict[str, Any] | None:
        """The queue's settings and `size`, or None: there is no such queue."""
        answer = await self._call("info", "GET", f"/queues/{_name(queue)}", absent=True)
        return None if answer is None else answer["queue"]

    async def post(self, queue: str, body: str) -> str:
        """Put one message on the queue; its id. It may be stored though no answer comes."""
        content = {"messages": [{"body": body}]}
        answer = await self._call("post", "POST", f"/queues/{_name(queue)}/messages", content)
        return str((answer or {})["ids"][0])

    async def reserve(self, queue: str, count: int, lease_s: int, wait_s: int = 0) -> list[Message]:
        """Take up to `count` (at most 100) messages for `lease_s` seconds, oldest first.

        Args: wait_s: hold the call so long (at most 30) until there is one.
        """
        content = {"n": count, "timeout": lease_s, "wait": wait_s}
        path = f"/queues/{_name(queue)}/reservations"
        answer = await self._call(
            "reserve", "POST", path, content, absent=True, longer_s=wait_s, repeat=False
        )
        return _messages(answer)

    async def peek(self, queue: str, count: int) -> list[Message]:
        """Look at up to `count` (at most 100) messages, oldest first, without taking them."""
        path = f"/queues/{_name(queue)}/messages?n={count}"
        return _messages(await self._call("peek", "GET", path, absent=True))

    async def get(self, queue: str, id: str) -> Message | None:
        """One message by its id, or None: it is gone."""
        path = f"/queues/{_name(queue)}/messages/{_name(id)}"
        answer = await self._call("get", "GET", path, absent=True)
        return None if answer is None else _message(answer["message"])

    async def delete(self, queue: str, entries: Sequence[tuple[str, str | None]]) -> None:
        """Delete messages by id and, where we hold one, reservation id; absent ones are done.

        Raises: Refused: one of them is reserved by somebody else; some may be deleted.
        """
        for at in range(0, len(entries), DELETE_MAX_IDS):
            some = entries[at : at + DELETE_MAX_IDS]
            content = {"ids": [_entry(id, reservation) for id, reservation in some]}
            try:
                await self._call("delete", "DELETE", f"/queues/{_name(queue)}/messages", content)
            except Refused as exc:
                if exc.status in (401, 429):
                    raise
                # the reference does not say what a bad entry does to the others
                await self._delete_singly(queue, some)

    async def _delete_singly(self, queue: str, entries: Sequence[tuple[str, str | None]]) -> None:
        refused: Refused | None = None
        for id, reservation in entries:
            path = f"/queues/{_name(queue)}/messages/{_name(id)}"
            content = {"reservation_id": reservation} if reservation else {}
            try:
                await self._call("delete", "DELETE", path, content, absent=True)
            except Refused as exc:
                refused = exc
        if refused is not None:
            raise refused

    async def touch(self, queue: str, message: Message, lease_s: int) -> Message:
        """Prolong a lease; the message with its new reservation id. Raises: Refused: it is lost."""
        path = f"/queues/{_name(queue)}/messages/{_name(message.id)}/touch"
        content = {"reservation_id": message.reservation_id, "timeout": lease_s}
        answer = await self._call("touch", "POST", path, content)
        return message._replace(reservation_id=(answer or {})["reservation_id"])

    async def release(self, queue: str, message: Message) -> None:
        """Give a reserved message back at once; one whose lease is lost is given back already."""
        path = f"/queues/{_name(queue)}/messages/{_name(message.id)}/release"
        content = {"reservation_id": message.reservation_id, "delay": 0}
        try:
            await self._call("release", "POST", path, content, absent=True)
        except Refused as exc:
            if exc.status != 403:
                raise

    async def _call(
        self,
        kind: str,
        method: str,
        path: str,
        content: Any = None,
        *,
        absent: bool = False,
        longer_s: float = 0.0,
        repeat: bool = True,
    ) -> dict[str, Any] | None:
        """One call, repeated with full jitter while that may help; None for 404 if `absent`."""
        timeout_s = self._timeout_s + longer_s
        stop = tenacity.stop_after_delay(timeout_s) if repeat else tenacity.stop_after_attempt(1)
        try:
            async with asyncio.timeout(timeout_s):
                async for attempt in tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(_Again),
                    wait=tenacity.wait_random_exponential(multiplier=0.1, max=5, exp_base=4),
                    stop=stop,
                    reraise=True,
                ):
                    with attempt:
                        return await self._once(kind, method, path, content, absent)
        except TimeoutError:
            raise MirrorUnavailable(f"IronMQ does not answer within {timeout_s:g} s") from None
        except _Again as exc:
            raise MirrorUnavailable(str(exc)) from None
        raise AssertionError  # AsyncRetrying ends by return or raise

    async def _once(
        self, kind: str, method: str, path: str, content: Any, absent: bool
    ) -> dict[str, Any] | None:
        self.calls[kind] += 1
        headers = dict(self._headers)
        data = None
        if content is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(content).encode()
        try:
            async with self._session.request(
                method, self._base + path, data=data, headers=headers
            ) as response:
                text = await response.read()
        except (aiohttp.ClientError, OSError) as exc:
            raise _Again(f"IronMQ can't be reached: {type(exc).__name__}") from None
        if response.status == 404 and absent:
            return None
        if response.status in (408, 429) or response.status >= 500:
            raise _Again(f"IronMQ answers {response.status}")
        if response.status >= 400:
            raise Refused(response.status, _refusal(response.status, text))
        try:
            answer: dict[str, Any] = json.loads(text)
        except ValueError:
            raise _Again("IronMQ's answer is not JSON") from None
        return answer


@asynccontextmanager
async def open_client(settings: Settings) -> AsyncIterator[Client]:
    """A client with a bounded number of connections; nothing is sent yet."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
    ) as session:
        yield Client(session, settings)


def _name(text: str) -> str:
    return quote(text, safe="")


def _entry(id: str, reservation: str | None) -> dict[str, str]:
    return {"id": id, "reservation_id": reservation} if reservation else {"id": id}


def _message(raw: dict[str, Any]) -> Message:
    return Message(str(raw["id"]), raw.get("body") or "", raw.get("reservation_id"))


def _messages(answer: dict[str, Any] | None) -> list[Message]:
    return [_message(raw) for raw in (answer or {}).get("messages") or ()]


def _refusal(status: int, text: bytes) -> str:
    """What IronMQ says, in a line; never what was sent, which holds the token."""
    if status == 401:
        return "IronMQ does not accept the credentials (ironmq_token, ironmq_project_id)"
    try:
        said = json.loads(text)["msg"]
    except (ValueError, KeyError, TypeError):
        said = "no reason"
    return f"IronMQ refuses: {status} {str(said)[:200]}"
