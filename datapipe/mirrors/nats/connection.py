"""A connection of nats-py: how it is made, ended and asked why; and what is repaired of it here.

No error that leaves this file holds anything that could be a secret.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from contextlib import suppress
from typing import Any
from urllib.parse import ParseResult

import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.client import RawCredentials, Srv
from nats.aio.transport import TcpTransport

from datapipe.errors import ConfigError
from datapipe.settings import Settings

# A node that is frozen is noticed after three of these; nats-py's own default is minutes.
_PING_S = 2.0
_AGAIN_S = 0.25  # between two tries to reach the same node
_CLOSE_S = 1.0
_PENDING_BYTES = 64 << 20

_CREDS = re.compile(r"BEGIN NATS USER JWT-+\s+\S[\s\S]*BEGIN USER NKEY SEED-+\s+\S")


class _Transport(TcpTransport):
    async def wait_closed(self) -> None:
        """Not for ever, which it would take after a TLS handshake that failed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await super().wait_closed()  # type: ignore[no-untyped-call]

    def __bool__(self) -> bool:
        return True  # else nats-py takes another one


class Connection(NatsClient):
    """That of nats-py, with two of its faults repaired; once it is lost, another one is made.

    nats-py would connect again by itself: in a task that may drop its cancellation (see
    `pipeline.tasks.background`), goes on for ever then, and keeps the process from ending; and it
    would send what it could not send before, perhaps hours later, when the ledger may have
    forgotten it.

    Args: before: the one before; the nodes that it was told of are known to this one, too.
    Attributes: lost: set once it is, or of no use.
    """

    def __init__(self, before: Connection | None = None) -> None:
        super().__init__()
        self.lost = asyncio.Event()
        self._before = before

    def _setup_server_pool(self, connect_url: list[str]) -> None:
        super()._setup_server_pool(connect_url)
        before, self._before = self._before, None
        if before is not None:
            known = {each.uri.netloc for each in self._server_pool}
            told = [each for each in before._server_pool if each.discovered]
            self._server_pool += [each for each in told if each.uri.netloc not in known]

    async def _process_op_err(self, e: Exception) -> None:
        await self._error_cb(e)
        self.lost.set()

    async def on_closed(self) -> None:
        """For `connect`: nats-py has closed it."""
        self.lost.set()

    def abort(self) -> None:
        """What the node has not read is not sent to it any more, should it be frozen and thaw."""
        self._pending, self._pending_data_size = [], 0
        with suppress(Exception):  # no public name reaches the socket
            self._transport._io_writer.transport.abort()  # type: ignore[union-attr]

    async def _connect_to_server(self, s: Srv) -> None:
        self._transport = self._transport or _Transport()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    def _connect_command(self) -> bytes:
        """Where TLS is wanted, the login goes by TLS alone.

        Otherwise a server, or whoever sits in between, gets it in the clear by saying that it needs
        no TLS, even if the URL is tls://.
        """
        if self.options.get("tls") and not self._server_info.get("tls_required"):
            raise _WithoutTls("nats: TLS is required here, and the server does not offer it")
        return super()._connect_command()


class _WithoutTls(nats.errors.Error):
    pass


async def close(connection: Connection) -> None:
    """Whatever state it is in; what it has not sent yet is not sent any more."""
    closing = asyncio.create_task(connection.close())
    closing.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.wait([closing], timeout=_CLOSE_S)
    closing.cancel()
    connection.abort()  # nats-py waits until all is sent
    await asyncio.wait([closing], timeout=_CLOSE_S)  # the event loop closes the socket meanwhile


def others_first(servers: list[str], left: ParseResult | None) -> list[str]:
    """In any order, but for the one that we have just left."""
    random.shuffle(servers)
    return sorted(servers, key=lambda each: left is not None and left.netloc in each)


def text(exc: Exception) -> str:
    """Why, without anything that could be a secret: no URL, no content of a file."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, nats.errors.Error):
        return str(exc).removeprefix("nats: ").strip("'") or type(exc).__name__
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, ssl.SSLError):
        return type(exc).__name__
    return f"can't log in or connect ({type(exc).__name__})"


def refuses(exc: Exception) -> bool:
    """Whether somebody answered and did not let us in, or our own files are wrong."""
    if isinstance(exc, nats.errors.Error):
        return isinstance(exc, _WithoutTls) or "auth" in str(exc).lower()
    if isinstance(exc, ssl.SSLError):
        return isinstance(exc, ssl.SSLCertVerificationError) or "ALERT" in str(exc.reason)
    return not isinstance(exc, OSError | TimeoutError)


def credentials(path: str) -> RawCredentials | None:
    """What a .creds file holds, read anew for each connection: it may be replaced meanwhile.

    In a file without a JWT nats-py would look for one for ever, and hold up the whole process.
    Raises: OSError, ValueError.
    """
    if not path:
        return None
    with open(path, encoding="ascii") as file:
        content = file.read(1 << 20)
    if not _CREDS.search(content):
        raise ValueError
    return RawCredentials(content)


def _tls(settings: Settings) -> ssl.SSLContext:
    """Raises: ConfigError."""
    key = "nats_ca_file"
    try:
        context = ssl.create_default_context(cafile=settings.nats_ca_file or None)
        if settings.nats_cert_file:
            key = "nats_cert_file, nats_key_file"
            # with a password given here, nobody at the terminal is asked for a key's passphrase
            context.load_cert_chain(
                settings.nats_cert_file, settings.nats_key_file, password=lambda: ""
            )
    except (OSError, ValueError) as exc:
        kinds = (
            "certificates" if key == "nats_ca_file" else "a certificate and its key, unencrypted"
        )
        raise ConfigError(f"{key}: must hold {kinds}, in PEM") from exc
    return context


def options(settings: Settings) -> dict[str, Any]:
    """Arguments for nats-py's `connect`. Raises: ConfigError."""
    servers = [each.strip() for each in settings.nats_url.split(",") if each.strip()]
    files = settings.nats_ca_file or settings.nats_cert_file
    tls = None
    if files or any(each.startswith("tls://") for each in servers):
        tls = _tls(settings)
    return {
        "servers": others_first(servers, None),
        "dont_randomize": True,
        "name": "datapipe",
        "user": settings.nats_user or None,
        "password": settings.nats_password or None,
        "nkeys_seed": settings.nats_nkey_file or None,
        "tls": tls,
        "connect_timeout": 2,
        "reconnect_time_wait": _AGAIN_S,
        "max_reconnect_attempts": -1,
        "ping_interval": _PING_S,
        "max_outstanding_pings": 2,
        "pending_size": _PENDING_BYTES,
    }
