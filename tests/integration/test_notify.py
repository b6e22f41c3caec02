"""What systemd is told: `Type=notify`, by datagrams to the socket that it names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from datapipe.cli import notify
from tests.wire import running

IDLE = {"database_url": "postgresql://127.0.0.1:1/x", "mirror": "none", "shutdown_timeout": 0}


class Systemd:
    """Its end of the socket. Attributes: address: as it stands in `$NOTIFY_SOCKET`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(address.replace("@", "\0", 1))

    async def told(self, *, pings: bool = False) -> dict[str, str]:
        """The next message, by its keys; pings are passed over, or alone are wanted."""
        async with asyncio.timeout(20):
            while True:
                text = (await asyncio.get_running_loop().sock_recv(self.socket, 4096)).decode()
                message = dict(line.split("=", 1) for line in text.splitlines())
                if ("WATCHDOG" in message) == pings:
                    return message

    def waiting(self) -> list[str]:
        """All that has come and was not read."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture(params=["a file", "an abstract name"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    name = f"@datapipe-{uuid4().hex}" if "abstract" in request.param else str(tmp_path / "notify")
    made = Systemd(name)
    yield made
    made.socket.close()


async def test_a_service_tells_of_its_life(systemd: Systemd, tmp_path: Path) -> None:
    """Ready with an open port, reloading and ready again, stopping; and that its loop turns."""
    env = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "300000"}
    async with running(tmp_path, env, **IDLE) as service:
        assert await systemd.told() == {"READY": "1", "STATUS": f"listening on {service.url}"}
        started = time.monotonic()
        for _ in range(5):
            await systemd.told(pings=True)
        assert time.monotonic() - started < 5 * 0.3
        before = time.monotonic_ns() // 1000
        os.kill(service.pid, signal.SIGHUP)
        reloading = await systemd.told()
        assert reloading.pop("RELOADING") == "1"
        assert before < int(reloading["MONOTONIC_USEC"]) < time.monotonic_ns() // 1000
        assert (await systemd.told())["READY"] == "1"
        service.file.write_text("{")  # not taken over; and it is not for ever reloading
        os.kill(service.pid, signal.SIGHUP)
        assert "RELOADING" in await systemd.told()
        assert (await systemd.told())["READY"] == "1"
        assert await service.stop() == 0
    assert (await systemd.told())["STOPPING"] == "1"


async def test_a_loop_that_is_blocked_is_silent(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    async with notify.watchdog():
        for _ in range(3):
            await systemd.told(pings=True)
        systemd.waiting()
        time.sleep(0.2)
        assert systemd.waiting() == []
        await systemd.told(pings=True)
    await asyncio.sleep(0.06)
    systemd.waiting()
    await asyncio.sleep(0.06)
    assert systemd.waiting() == []


@pytest.mark.parametrize(
    "env",
    [
        {"WATCHDOG_PID": "1", "WATCHDOG_USEC": "1000"}, {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "x"}, {},
    ],
)  # fmt: skip
async def test_who_is_not_watched_says_nothing(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    for name in ("WATCHDOG_PID", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (env | {"NOTIFY_SOCKET": systemd.address}).items():
        monkeypatch.setenv(name, value)
    async with notify.watchdog():
        await asyncio.sleep(0.02)
    assert systemd.waiting() == []


@pytest.mark.parametrize("address", ["", "/no/such", "@nobody", "relative", "vsock:2:1234"])
def test_a_socket_that_is_not_there_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready("listening")
    notify.reloading()
    notify.stopping()


async def test_a_systemd_that_does_not_read_holds_up_no_event(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    with (
        contextlib.suppress(BlockingIOError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler,
    ):
        filler.setblocking(False)
        while True:
            filler.sendto(b"x", systemd.address.replace("@", "\0", 1))
    began = time.monotonic()
    async with notify.watchdog():
        await asyncio.sleep(0.05)
    assert time.monotonic() - began < 5  # nobody will ever read
