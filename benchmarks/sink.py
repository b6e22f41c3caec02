"""The generator's own limit: a server that reads no request, but counts its bytes and answers."""

from __future__ import annotations

import asyncio
import json
from typing import cast

import uvloop

from benchmarks.bare import ANSWER

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)


class Sink(asyncio.Protocol):
    """One connection; a head comes in one piece, as wrk sends it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._missing = 0  # bytes of the body that are still to come

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            head, _, body = data.partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2]
            self._missing = int(length.partition(b"\r\n")[0]) - len(body)
        if not self._missing:
            self._transport.write(_ANSWER)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0, backlog=1024)
    host, port = server.sockets[0].getsockname()[:2]
    print(json.dumps({"event": "listening", "address": f"http://{host}:{port}"}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
