"""A connection to a NATS cluster that comes back by itself, and requests over it.

Of nats-py only connect, publish, subscribe and request are used: its `fetch` may stall, and its
JetStream classes lack what is needed here. Source: nats-io/nats.py, issues 386 and 986.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from datapipe.errors import MirrorUnavailable
from datapipe.health import Health
from datapipe.mirrors.nats.connection import (
    Connection,
    close,
    credentials,
    options,
    others_first,
    refuses,
    text,
)
from datapipe.retry import backoff
from datapipe.settings import Settings

ANSWER_S = 2.0  # a request that takes longer is sent again, perhaps to another leader
# Without a useful answer for so long, we try another node: ours may be cut off from the others, and
# answer to pings all the same; or nats-py waits until a node that is frozen has read what is sent.
_SILENT_S = 5.0
# What one says that has lost the others. Source: nats-io/nats-server, server/errors.json.
_NO_QUORUM = re.compile(rb'"err_code":(10008|10158|10167)\b')
_ERROR_BYTES = 500
_INFOS = {"STREAM.INFO", "CONSUMER.INFO"}  # a leader answers them even if it has lost the others
_RETRY_MAX_S = 2.0
# not of acknowledgements: each of them has a subject of its own
_DENIED = re.compile(r'permissions violation for publish to "(?!\$js\.ack)([^"]+)"', re.IGNORECASE)


OnMessage = Callable[[Msg], Awaitable[None]]

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


class NoResponders(MirrorUnavailable):
    """Nobody listens there: no such stream, or one without a leader."""


class Denied(MirrorUnavailable):
    """Our account may not publish there."""


class ApiError(MirrorUnavailable):
    """JetStream refuses a call. Attributes: code: its `err_code`, such as 10077."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Client:
    """Every call raises MirrorUnavailable if there is no answer in time.

    Attributes:
        calls: requests sent so far, by kind.
        health: whether the cluster answers, by the outcome of each request.
        refused: why a server that answers does not let us in, or None; a person must act.
        denied: subjects, in lower case, for which we lack a right.
    """

    def __init__(self, settings: Settings) -> None:
        self.calls: Counter[str] = Counter()
        self.health = Health()
        self.refused: str | None = None
        self.denied: set[str] = set()
        self._options = options(settings)
        self._creds = settings.nats_creds
        self._connection = Connection()
        self._connected = asyncio.Event()
        self._silent_since: dict[bool, float] = {}  # of calls that are infos, and of others
        self._error = "not connected yet"
        self._subscriptions: dict[str, OnMessage] = {}
        self._subscribed: set[str] = set()  # of them, on this connection

    # --- the connection ---

    @asynccontextmanager
    async def connecting(self) -> AsyncIterator[None]:
        """Connect in the background, again and again; disconnect at the end."""
        task = asyncio.create_task(self._stay_connected())
        try:
            yield
        finally:
            while not task.done():  # nats-py may drop a cancellation while it connects
                task.cancel()
                await asyncio.wait([task], timeout=0.2)
            await close(self._connection)

    async def _stay_connected(self) -> None:
        """A connection that is lost, or to a node that is of no use, gives way to another."""
        failures = 0
        while True:
            connection = self._connection = Connection(self._connection)
            self._subscribed.clear()
            try:
                await connection.connect(
                    **self._options, user_credentials=credentials(self._creds),
                    error_cb=self._on_error, closed_cb=connection.on_closed,
                )  # fmt: skip
                failures = 0
                await self._on_connected()
                await connection.lost.wait()
            except Exception as exc:  # whatever a file of credentials or a server makes it raise
                await self._on_error(exc)
            failures += 1
            self._connected.clear()
            self.health.fails(time.perf_counter(), self._trouble)
            left = connection.connected_url
            connection.abort()
            await close(connection)
            self._options["servers"] = others_first(self._options["servers"], left)
            await asyncio.sleep(backoff(failures, _RETRY_MAX_S))

    async def _on_error(self, exc: Exception) -> None:
        # a server that refuses may cut the connection before its reason is read
        if self.refused is None or not isinstance(exc, ConnectionResetError):
            self._error = text(exc)
            self.refused = self._error if refuses(exc) else None
        if denied := _DENIED.search(str(exc)):  # the request itself will only time out
            self.denied.add(denied[1])
        log.debug("nats", error=self._error)
        if not self._connected.is_set():
            self.health.fails(time.perf_counter(), self._trouble)

    @property
    def _trouble(self) -> str:
        return f"NATS{' refuses us' if self.refused else ''}: {self._error}"

    async def _on_connected(self) -> None:
        self.refused = None
        self.denied.clear()
        self._silent_since.clear()
        self._connected.set()
        await self._subscribe_all()

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises: MirrorUnavailable: why not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise MirrorUnavailable(self._trouble) from None

    @property
    def hosts(self) -> set[str]:
        """Those of all nodes that we know of: as set, and as the servers say."""
        return {each.hostname for each in self._connection.servers if each.hostname}

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message, headers included, as the server says."""
        return int(self._connection.max_payload)

    @property
    def version(self) -> str:
        """Of the server that we are connected to."""
        return str(self._connection.connected_server_version).strip("<>").split(" v")[-1]

    # --- calls ---

    async def subscribe(self, subject: str, on_message: OnMessage) -> None:
        """From now on, whatever connection there is, get what is published there."""
        self._subscriptions[subject] = on_message
        if self._connected.is_set():
            await self._subscribe_all()

    async def _subscribe_all(self) -> None:
        for subject, on_message in list(self._subscriptions.items()):
            if subject not in self._subscribed:
                self._subscribed.add(subject)
                try:
                    await self._subscribe(subject, on_message)
                except nats.errors.Error:  # the next connection makes up for it
                    self._subscribed.discard(subject)

    async def _subscribe(self, subject: str, on_message: OnMessage) -> Subscription:
        return await self._connection.subscribe(
            subject, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1
        )

    @asynccontextmanager
    async def subscribed(self, subject: str, on_message: OnMessage) -> AsyncIterator[None]:
        """The same for the block. Raises: MirrorUnavailable: not connected."""
        if not self._connected.is_set():
            raise MirrorUnavailable(self._trouble)
        try:
            subscription = await self._subscribe(subject, on_message)
        except nats.errors.Error as exc:
            raise MirrorUnavailable(f"NATS: {text(exc)}") from exc
        try:
            yield
        finally:
            with suppress(nats.errors.Error):  # a connection that has ended forgets it anyway
                await subscription.unsubscribe()

    def new_inbox(self) -> str:
        """A subject for answers that nobody else has."""
        return str(self._connection.new_inbox())

    async def request(
        self,
        call: str,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = ANSWER_S,
    ) -> Msg:
        """Send and wait for the answer. Args: call: what it is counted as.

        Raises: MirrorUnavailable: it may have had its effect; NoResponders; Denied.
        """
        self._check_right(subject)
        self.calls[call] += 1
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
                began = time.perf_counter()  # a failure while it waited says nothing of it
                answer = await self._connection.request(
                    subject, payload, timeout=timeout_s, headers=dict(headers) if headers else None
                )
        except nats.errors.NoRespondersError:
            self._heard(call, useful=False)
            raise NoResponders("NATS: nobody answers: no such stream, or no leader") from None
        except (nats.errors.Error, TimeoutError, OSError) as exc:
            self._heard(call, useful=False)
            self._check_right(subject)
            raise self._unavailable(exc, timeout_s, began) from exc
        self._heard(call, useful=not _NO_QUORUM.search(answer.data, 0, _ERROR_BYTES))
        self.health.works(began)
        return answer

    def _check_right(self, subject: str) -> None:
        if subject.lower() in self.denied:  # so does nats-py write them
            raise Denied(f"NATS refuses us: may not publish to {subject}: see `datapipe check`")

    def _heard(self, call: str, *, useful: bool) -> None:
        """How a request has ended. After `_SILENT_S` without use another node is tried.

        An info that comes says nothing of the other calls, and excuses other infos alone.
        """
        infos, now = call in _INFOS, time.monotonic()
        if useful:
            self._silent_since.pop(infos, None)
            if not infos:
                self._silent_since.clear()
        elif (
            self._connected.is_set() and now - self._silent_since.setdefault(infos, now) > _SILENT_S
        ):
            self._silent_since.clear()
            self._connection.lost.set()

    def _unavailable(self, exc: Exception, timeout_s: float, began: float) -> MirrorUnavailable:
        why = self._trouble
        if self._connected.is_set():
            why = f"NATS: {text(exc)}"
            if isinstance(exc, TimeoutError):  # often what was left of a longer time
                limit = f"within {timeout_s:.0f} s" if timeout_s >= 1 else "in time"
                why = f"NATS does not answer {limit}"
        self.health.fails(began, why)
        return MirrorUnavailable(why)

    async def api(self, call: str, *, timeout_s: float = ANSWER_S, **body: Any) -> dict[str, Any]:
        """A call of JetStream's API, such as STREAM.INFO.name. Raises: MirrorUnavailable, ApiError.

        Source: docs.nats.io, "NATS API Reference".
        """
        kind = ".".join(call.split(".")[:2])
        payload = msgspec.json.encode(body) if body else b""
        answer = await self.request(kind, f"$JS.API.{call}", payload, timeout_s=timeout_s)
        return decoded(answer.data)

    async def publish(self, call: str, subject: str, payload: bytes = b"", reply: str = "") -> None:
        """Send; nobody says whether it arrived. Raises: MirrorUnavailable: not connected."""
        self.calls[call] += 1
        if not self._connected.is_set():
            raise MirrorUnavailable(self._trouble)
        try:
            await self._connection.publish(subject, payload, reply=reply)
        except (nats.errors.Error, OSError) as exc:
            raise MirrorUnavailable(f"NATS: {text(exc)}") from exc


def decoded(data: bytes) -> dict[str, Any]:
    """An answer of JetStream. Raises: ApiError: it is an error."""
    try:
        answer = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as exc:
        raise MirrorUnavailable(f"NATS: no answer of JetStream: {exc}") from exc
    if error := answer.get("error"):
        code = int(error.get("err_code", error.get("code", 0)))
        raise ApiError(code, f"NATS: {error.get('description', '')} ({code})")
    return answer
