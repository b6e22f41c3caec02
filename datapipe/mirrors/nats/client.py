"""A connection to a NATS cluster that comes back by itself, and requests over it.

Of nats-py only connect, publish, subscribe and request are used: its `fetch` may stall, and its
JetStream classes lack what is needed here. Source: nats-io/nats.py, issues 386 and 986.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import ParseResult

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from datapipe.errors import MirrorUnavailable
from datapipe.health import Health
from datapipe.retry import backoff
from datapipe.settings import Settings

ANSWER_S = 2.0  # a request that takes longer is sent again, perhaps to another leader
# A node that is frozen is noticed after three of these; nats-py's own default is minutes.
_PING_S = 2.0
_RECONNECT_S = 0.25
# Without a useful answer for so long, we try another node: ours may be cut off from the others, and
# answer to pings all the same; or nats-py waits until a node that is frozen has read what is sent.
_SILENT_S = 5.0
_CLOSE_S = 1.0
# What one says that has lost the others. Source: nats-io/nats-server, server/errors.json.
_NO_QUORUM = re.compile(rb'"err_code":(10008|10158|10167)\b')
_ERROR_BYTES = 500
_INFOS = {"STREAM.INFO", "CONSUMER.INFO"}  # a leader answers them even if it has lost the others
_RETRY_MAX_S = 2.0
_PENDING_BYTES = 64 << 20

OnMessage = Callable[[Msg], Awaitable[None]]

log = structlog.stdlib.get_logger("datapipe.mirrors.nats")


class NoResponders(MirrorUnavailable):
    """Nobody listens there: no such stream, or one without a leader."""


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
    """

    def __init__(self, settings: Settings) -> None:
        self.calls: Counter[str] = Counter()
        self.health = Health()
        self._options = _options(settings)
        self._connection = Connection()
        self._connected = asyncio.Event()
        self._ended = asyncio.Event()  # the connection is closed for good, or of no use
        self._silent_since: float | None = None
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
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await _close(self._connection)

    async def _stay_connected(self) -> None:
        """nats-py reconnects by itself, but not after all errors, nor from a useless node."""
        failures = 0
        while True:
            self._ended.clear()
            self._connection = Connection()
            self._subscribed.clear()
            try:
                await self._connection.connect(
                    **self._options, error_cb=self._on_error, closed_cb=self._on_closed,
                    disconnected_cb=self._on_disconnected, reconnected_cb=self._on_connected,
                )  # fmt: skip
                failures = 0
                await self._on_connected()
                await self._ended.wait()
            except Exception as exc:  # whatever a file of credentials or a server makes it raise
                await self._on_error(exc)
            failures += 1
            await self._on_disconnected()
            left = self._connection.connected_url
            await _close(self._connection)
            self._options["servers"] = _others_first(self._options["servers"], left)
            await asyncio.sleep(backoff(failures, _RETRY_MAX_S))

    async def _on_error(self, exc: Exception) -> None:
        self._error = _text(exc)
        log.debug("nats", error=self._error)
        if not self._connected.is_set():
            self.health.fails(time.perf_counter(), f"NATS: {self._error}")

    async def _on_connected(self) -> None:
        self._silent_since = None
        self._connected.set()
        await self._subscribe_all()

    async def _on_disconnected(self) -> None:
        self._connected.clear()
        self.health.fails(time.perf_counter(), f"NATS: {self._error}")

    async def _on_closed(self) -> None:
        self._ended.set()

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
        """What came while nats-py was reconnecting it does not know: it would be deaf for ever."""
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
            raise MirrorUnavailable(f"NATS: {self._error}")
        try:
            subscription = await self._subscribe(subject, on_message)
        except nats.errors.Error as exc:
            raise MirrorUnavailable(f"NATS: {_text(exc)}") from exc
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

        Raises: MirrorUnavailable: it may have had its effect; NoResponders.
        """
        self.calls[call] += 1
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
                answer = await self._connection.request(
                    subject, payload, timeout=timeout_s, headers=dict(headers) if headers else None
                )
        except nats.errors.NoRespondersError:
            self._heard(useful=False)
            raise NoResponders("NATS: nobody answers: no such stream, or no leader") from None
        except (nats.errors.Error, TimeoutError, OSError) as exc:
            self._heard(useful=False)
            raise self._unavailable(exc, timeout_s, began) from exc
        lost = _NO_QUORUM.search(answer.data, 0, _ERROR_BYTES) is not None
        if lost or call not in _INFOS:
            self._heard(useful=not lost)
        self.health.works(began)
        return answer

    def _heard(self, *, useful: bool) -> None:
        """How a request has ended. After `_SILENT_S` without use another node is tried."""
        now = time.monotonic()
        if useful:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif self._connected.is_set() and now - self._silent_since > _SILENT_S:
            self._silent_since = None
            self._ended.set()

    def _unavailable(self, exc: Exception, timeout_s: float, began: float) -> MirrorUnavailable:
        why = f"NATS: {self._error}"
        if self._connected.is_set():
            late = isinstance(exc, TimeoutError)
            why = f"NATS does not answer within {timeout_s:g} s" if late else f"NATS: {_text(exc)}"
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
            raise MirrorUnavailable(f"NATS: {self._error}")
        try:
            await self._connection.publish(subject, payload, reply=reply)
        except (nats.errors.Error, OSError) as exc:
            raise MirrorUnavailable(f"NATS: {_text(exc)}") from exc


async def _close(connection: Connection) -> None:
    """Whatever state it is in; what it has not sent yet is not sent any more."""
    with suppress(Exception):
        async with asyncio.timeout(_CLOSE_S):
            await connection.close()
    with suppress(
        Exception
    ):  # nats-py itself waits until all is sent, to a node that is frozen, too
        connection._transport._io_writer.transport.abort()  # type: ignore[union-attr]


def _others_first(servers: list[str], left: ParseResult | None) -> list[str]:
    """In any order, but for the one that we have just left."""
    random.shuffle(servers)
    return sorted(servers, key=lambda each: left is not None and left.netloc in each)


def decoded(data: bytes) -> dict[str, Any]:
    """An answer of JetStream. Raises: ApiError: it is an error."""
    answer: dict[str, Any] = msgspec.json.decode(data)
    if error := answer.get("error"):
        code = int(error.get("err_code", error.get("code", 0)))
        raise ApiError(code, f"NATS: {error.get('description', '')} ({code})")
    return answer


def _text(exc: Exception) -> str:
    """Why, without anything that could be a secret: no URL, no content of a file."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, nats.errors.Error):
        return str(exc).removeprefix("nats: ").strip("'") or type(exc).__name__
    if isinstance(exc, ssl.SSLError | TimeoutError):
        return f"{type(exc).__name__}"
    return f"can't log in or connect ({type(exc).__name__})"


def _options(settings: Settings) -> dict[str, Any]:
    """Arguments for nats-py's `connect`."""
    servers = [each.strip() for each in settings.nats_url.split(",") if each.strip()]
    files = settings.nats_ca_file or settings.nats_cert_file
    tls = None
    if files or any(each.startswith("tls://") for each in servers):
        tls = ssl.create_default_context(cafile=settings.nats_ca_file or None)
        if settings.nats_cert_file:
            tls.load_cert_chain(settings.nats_cert_file, settings.nats_key_file or None)
    return {
        "servers": _others_first(servers, None),
        "dont_randomize": True,
        "name": "datapipe",
        "user": settings.nats_user or None,
        "password": settings.nats_password or None,
        "user_credentials": settings.nats_creds or None,
        "nkeys_seed": settings.nats_nkey_file or None,
        "tls": tls,
        "connect_timeout": 2,
        "reconnect_time_wait": _RECONNECT_S,
        "max_reconnect_attempts": -1,
        "ping_interval": _PING_S,
        "max_outstanding_pings": 2,
        "pending_size": _PENDING_BYTES,
    }
