"""Packages of third parties, installed as users install them, beside the tests' environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def install(source: Path, target: Path) -> None:
    """`pip install` of a package's folder into another: no network, nothing left in the source."""
    copy = target.parent / f"{target.name}-source"
    shutil.copytree(source, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    alone = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run([*pip, *alone, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
