"""Tells systemd how the service is: ready, reloading, stopping, and that its event loop turns.

Without `$NOTIFY_SOCKET` nothing is told. Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from datapipe.pipeline.tasks import background

_SEND_S = 1.0  # systemd reads at once; if it does not, events go before


def ready(status: str) -> None:
    """It takes events: at the start, or again after `reloading`.

    Args: status: one line for people.
    """
    _send(f"READY=1\nSTATUS={status}")


def reloading() -> None:
    """It reads its settings anew; `ready` must follow."""
    # the clock is for Type=notify-reload, which waits for what is newer than its signal
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """It takes nothing more, and loads what waits."""
    _send("STOPPING=1\nSTATUS=loading what waits")


@asynccontextmanager
async def watchdog() -> AsyncIterator[None]:
    """Tell systemd, where it wants to know (`WatchdogSec=`), that the event loop turns.

    One that is blocked for longer falls silent, and systemd ends the process and starts it again.
    """
    interval_s = _interval_s()
    pings = [_ping(interval_s)] if interval_s else []
    async with background(pings, lambda failure: None):
        yield


async def _ping(interval_s: float) -> None:
    while True:
        _send("WATCHDOG=1", wait_s=0)  # two come in each interval: one may be lost
        await asyncio.sleep(interval_s)


def _interval_s() -> float | None:
    """Half of what systemd waits, as it advises; None: it does not wait for this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    with suppress(ValueError):
        return int(os.environ.get("WATCHDOG_USEC", "")) / 2e6 or None
    return None


def _send(message: str, wait_s: float = _SEND_S) -> None:
    """Give up after `wait_s`, in which the event loop stands still."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):  # unset, or of a kind that is not for services (vsock)
        return
    if address.startswith("@"):  # a name without a file: Linux wants it to begin with a NUL
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(wait_s)
        channel.sendto(message.encode(), address)
