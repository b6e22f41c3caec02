"""A server that speaks MySQL's protocol, lets everybody in, and asks for files."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_OK = b"\x00\x00\x00\x02\x00\x00\x00"
_GREETING = (
    b"\x0a5.5.5-10.11.0-MariaDB\0" + struct.pack("<I", 1) + b"8 bytes." + b"\0"
    + struct.pack("<HBHH", 0xF7FF, 45, 2, 0x00FF) + b"\x15" + b"\0" * 10
    + b"and twelve..\0" + b"mysql_native_password\0"
)  # fmt: skip


class MySqlServer:
    """Attributes: statements: what it was asked. received: what clients sent it as files."""

    def __init__(self, asks_at: Callable[[str], bool]) -> None:
        self._asks_at = asks_at
        self.statements: list[str] = []
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mysql://app@127.0.0.1:{self._listener.getsockname()[1]}/events"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                end, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with end, suppress(OSError, EOFError):
            stream = end.makefile("rwb")

            def send(sequence: int, payload: bytes) -> None:
                stream.write(struct.pack("<I", len(payload))[:3] + bytes([sequence]) + payload)
                stream.flush()

            def receive() -> tuple[int, bytes]:
                head = stream.read(4)
                if len(head) < 4:
                    raise EOFError
                return head[3], stream.read(int.from_bytes(head[:3], "little"))

            send(0, _GREETING)
            send(receive()[0] + 1, _OK)
            while True:
                sequence, payload = receive()
                statement = payload[1:].decode(errors="replace")
                self.statements.append(statement)
                if self._asks_at(statement):
                    send(sequence + 1, b"\xfb/etc/passwd")
                    content = b""
                    while (answer := receive())[1]:
                        content += answer[1]
                    self.received.append(content)
                    sequence = answer[0]
                send((sequence + 1) % 256, _OK)

    @classmethod
    @contextmanager
    def running(cls, asks_at: Callable[[str], bool]) -> Iterator[MySqlServer]:
        server = cls(asks_at)
        try:
            yield server
        finally:
            server._listener.close()
