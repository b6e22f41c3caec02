"""Runs a command of datapipe to its end, as a shell would."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.service import LINE_BYTES, zygote
from tests.zygote import ROOT, Forked, can_fork


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def one_line(self) -> str:
        """The one clear line of a command that failed."""
        assert "Traceback" not in self.out + self.err, self
        (line,) = self.err.splitlines()
        return line


def clean_environment() -> dict[str, str]:
    """One that knows nothing of datapipe."""
    ours = ("DATAPIPE_", "IRON_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    for name in ("PORT", "DATABASE_URL", "DYNO"):
        clean.pop(name, None)
    return clean | {"PYTHONPATH": str(ROOT)}


async def run(
    *words: str, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Result:
    """Run `datapipe` with these words.

    Args: env: over `clean_environment`.
    """
    process = await _start(words, cwd, dict(env or {}))
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
            code = await process.wait()
    except TimeoutError:  # it serves, though it was not to
        process.send_signal(signal.SIGKILL)
        await process.wait()
        return Result(-9, "", f"it did not end in {timeout_s} s")
    return Result(code, out.decode(), err.decode())


async def _start(
    words: Sequence[str], cwd: Path, env: dict[str, str]
) -> asyncio.subprocess.Process | Forked:
    whole = clean_environment() | env
    if can_fork(env):
        return await zygote().start(words, whole, cwd, LINE_BYTES, apart=True)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "datapipe", *words, env=whole, cwd=cwd,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def command(file: Path, *words: str) -> tuple[int, str]:
    """Run `datapipe` with this settings file, in its folder: exit code, and all that it says."""
    process = await zygote().start(
        words, {**clean_environment(), "DATAPIPE_CNF": str(file)}, file.parent, LINE_BYTES
    )
    output = await asyncio.wait_for(process.stdout.read(), 60)
    return await process.wait(), output.decode()
