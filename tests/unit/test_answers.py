"""What a command says where no service answers."""

from __future__ import annotations

import errno
import socket
import ssl
from argparse import Namespace
from typing import Any

import aiohttp
import pytest

from datapipe.cli.answers import unanswered
from datapipe.cli.commands import status
from datapipe.errors import DatapipeError
from datapipe.settings import Settings

NO_KEY: Any = None  # of a connection: only its own words have it


@pytest.mark.parametrize(
    ("exc", "said"),
    [
        (
            aiohttp.ClientConnectorError(
                NO_KEY, ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('::1', 1)")
            ),
            "Connection refused",
        ),
        (
            aiohttp.ClientConnectorDNSError(NO_KEY, socket.gaierror(-2, "Name not known")),
            "Name not known",
        ),
        (
            aiohttp.ClientConnectorError(
                NO_KEY, OSError("Multiple exceptions: [Errno 111], [Errno 101]")
            ),
            "Multiple exceptions: [Errno 111], [Errno 101]",
        ),
        (
            aiohttp.ClientConnectorError(
                NO_KEY, ssl.SSLCertVerificationError(1, "certificate verify failed")
            ),
            "certificate verify failed",
        ),
        (aiohttp.ServerDisconnectedError(), "Server disconnected"),
        (TimeoutError(), "not in time"),
    ],
    ids=["refused", "no host", "several", "certificate", "disconnected", "late"],
)
def test_in_the_words_of_the_system(exc: Exception, said: str) -> None:
    assert unanswered(exc) == said


@pytest.mark.parametrize("url", ["localhost", "localhost:8080", "127.0.0.1:8080", "http://h:x"])
async def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    with pytest.raises(DatapipeError, match="is not a URL like http://HOST:PORT"):
        await status(Settings(), Namespace(url=url, json=False))
