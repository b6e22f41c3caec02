"""Load: wrk (native) for single events, blocking sockets in threads for a count of batches."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

# Requests are made once and then sent in turn: no string is put together while it is measured.
_LUA = """
local requests, at = {}, 0
init = function(args)
  for line in io.lines(%(file)s) do
    requests[#requests + 1] = wrk.format("POST", "/", nil, line)
  end
end
request = function()
  at = at %% #requests + 1
  return requests[at]
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests": %%d, "seconds": %%f, "errors": %%d, "p50_ms": %%f, "p99_ms": %%f}\\n',
    summary.requests, summary.duration / 1e6,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


class Load(NamedTuple):
    """What was sent and answered with 200; `cpu_s` is the generator's own."""

    requests: int
    seconds: float
    cpu_s: float
    p50_ms: float
    p99_ms: float


def wrk(url: str, bodies: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Send bodies in turn over connections that are kept alive, as fast as they are answered.

    Raises: RuntimeError: an answer was no 2xx, or a connection failed.
    """
    if shutil.which("wrk") is None:
        raise RuntimeError("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="datapipe-bench-") as name:
        folder = Path(name)
        (folder / "bodies").write_bytes(b"".join(body + b"\n" for body in bodies))
        script = folder / "bench.lua"
        script.write_text(_LUA % {"file": json.dumps(str(folder / "bodies"))})
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency",
                   "-s", str(script), url]  # fmt: skip
        before = os.times()
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=seconds + 60
        )
        after = os.times()
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result["errors"]:
        raise RuntimeError(f"wrk: {result['errors']} errors\n{done.stdout}")
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    return Load(result["requests"], result["seconds"], cpu_s, result["p50_ms"], result["p99_ms"])


def post_all(url: str, bodies: Sequence[bytes], connections: int) -> Load:
    """POST each body once, each connection one after the other; ends with the last answer.

    Raises: RuntimeError: an answer was no 200.
    """
    address = urlsplit(url)
    host, port = str(address.hostname), int(address.port or 80)
    latencies: list[float] = []
    failures: list[str] = []

    def send(connection: socket.socket, number: int) -> None:
        try:
            for body in islice(bodies, number, None, connections):
                began = time.perf_counter()
                _post(connection, body)
                latencies.append(time.perf_counter() - began)
        except (OSError, RuntimeError) as exc:
            failures.append(str(exc))

    sockets = [socket.create_connection((host, port), timeout=60) for _ in range(connections)]
    threads = [
        threading.Thread(target=send, args=(each, number)) for number, each in enumerate(sockets)
    ]
    cpu_s, started = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    for each in sockets:
        each.close()
    if failures:
        raise RuntimeError(f"POST {url}: {failures[0]}")
    latencies.sort()
    p50, p99 = (latencies[int((len(latencies) - 1) * share)] * 1e3 for share in (0.5, 0.99))
    return Load(len(latencies), seconds, cpu_s, p50, p99)


def _post(connection: socket.socket, body: bytes) -> None:
    """One request and its answer. Raises: OSError, RuntimeError: it was no 200."""
    head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    left = connection.sendmsg([head, body]) - len(head)
    if left < len(body):
        connection.sendall(memoryview(body)[left:])
    answer = connection.recv(65536)
    while not _complete(answer):
        more = connection.recv(65536)
        if not more:
            raise RuntimeError("the connection was closed")
        answer += more
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(answer.decode(errors="replace")[:500])


def _complete(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    _, _, length = head.lower().partition(b"content-length:")
    return len(body) >= int(length.partition(b"\r\n")[0])
