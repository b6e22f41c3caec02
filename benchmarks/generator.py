"""Load from wrk, a native generator: as fast as it is answered, or at a fixed rate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

_FOLDER = Path(__file__).parent
_TIMEOUT_S = 20


class Load(NamedTuple):
    """What was answered with 2xx; `cpu_s` is the generator's own."""

    requests: int
    seconds: float
    cpu_s: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def cores(self) -> float:
        """CPU seconds a second of the generator."""
        return self.cpu_s / self.seconds


def wrk(
    url: str, bodies: Sequence[bytes], connections: int, seconds: float, encoding: str = ""
) -> Load:
    """Send bodies in turn over connections that are kept alive, as fast as they are answered.

    Args: seconds: at least 1; wrk knows whole ones. encoding: the `Content-Encoding`.
    Raises: RuntimeError: an answer was no 2xx, or a connection failed.
    """
    return _run("closed.lua", url, bodies, 1, connections, seconds, [encoding])


def keyed(
    url: str, bodies: Sequence[bytes], connections: int, seconds: float, *, keys: bool
) -> Load:
    """As `wrk`, each request with an `Idempotency-Key` of its own; without, at the same expense.

    Raises: RuntimeError: as `wrk`.
    """
    more = ["", str(uuid4())[:24], "yes" if keys else ""]
    return _run("keyed.lua", url, bodies, 1, connections, seconds, more)


def paced(url: str, bodies: Sequence[bytes], connections: int, rate: float, seconds: float) -> Load:
    """Send so many bodies a second, answered or not; latency counts from when each was due.

    Raises: RuntimeError: as `wrk`.
    """
    more = ["", f"{rate:f}", str(connections)]
    return _run("paced.lua", url, bodies, connections, connections, seconds, more)


def _run(
    script: str,
    url: str,
    bodies: Sequence[bytes],
    threads: int,
    connections: int,
    seconds: float,
    more: Sequence[str],
) -> Load:
    if shutil.which("wrk") is None:
        raise RuntimeError("wrk is not installed: apt-get install wrk")
    with tempfile.NamedTemporaryFile(prefix="datapipe-bench-") as file:
        for body in bodies:
            file.write(b"%d\n%b" % (len(body), body))
        file.flush()
        command = [
            "wrk", f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s",
            "--latency", "--timeout", f"{_TIMEOUT_S}s", "-s", script, url, "--", file.name, *more,
        ]  # fmt: skip
        before = os.times()
        done = subprocess.run(
            command, cwd=_FOLDER, capture_output=True, text=True, timeout=seconds + 120
        )
        after = os.times()
    if done.returncode:
        raise RuntimeError(f"wrk: {done.stderr}{done.stdout}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result["errors"]:
        raise RuntimeError(f"wrk: {result['errors']} errors\n{done.stdout}")
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    return Load(result["requests"], result["seconds"], cpu_s, result["p50_ms"], result["p99_ms"])
