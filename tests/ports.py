"""Ports for the servers of tests.

They are below those that the kernel gives to clients (32768 to 60999): a client that tries again
and again to reach a server that is down would in the end be given its port, and connect to itself.
Each worker has a share of its own, and goes through it, so that nobody else listens where the
server of a test is about to.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import random
import socket
from collections.abc import Iterator

_FIRST, _SHARE, _WORKERS = 15_000, 2_000, 8


@functools.cache
def _mine() -> Iterator[int]:
    """The share of this process, over and over; from anywhere, as other suites may run as well."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = _FIRST + worker % _WORKERS * _SHARE
    start = random.randrange(_SHARE)
    return itertools.cycle(first + (start + n) % _SHARE for n in range(_SHARE))


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody has there; in another network namespace, any."""
    found: list[int] = []
    while len(found) < count:
        port = next(_mine())
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL:  # there is such an address elsewhere
                    continue
        found.append(port)
    return found


def free_port() -> int:
    """See `free_ports`."""
    return free_ports("127.0.0.1", 1)[0]
