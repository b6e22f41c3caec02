"""What a deployment is made of: the tracked files, and an environment from the lock alone."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tests.service import ROOT

CACHE = ROOT / ".cache" / "deploy"
_UNREAD = ("benchmarks/", "docs/", "tests/")


def locked_environment() -> Path:
    """A virtual environment with what requirements.txt names, checked by hash; nothing else.

    It is kept, for as long as neither the lock nor this Python changes.
    """
    lock = ROOT / "requirements.txt"
    key = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:16]
    venv = CACHE / key
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (venv / "made").exists():
            for old in CACHE.iterdir():
                shutil.rmtree(old, ignore_errors=True)
            _run(sys.executable, "-m", "venv", str(venv))
            pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install"]
            _run(*pip, "--quiet", "--no-deps", "--require-hashes", "-r", str(lock))
            (venv / "made").touch()
    return venv


def tracked_files(into: Path, without: tuple[str, ...] = ()) -> None:
    """Copy what git has of this tree, as it is now. Args: without: folders that are left out."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        if name and not name.startswith(without) and (ROOT / name).exists():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def slug(into: Path) -> None:
    """Copy what a push would deploy, and compile it.

    Without what nothing in a dyno reads, as each dyno has a copy of its own.
    """
    tracked_files(into, _UNREAD)
    _run(sys.executable, "-m", "compileall", "-q", str(into / "datapipe"))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
