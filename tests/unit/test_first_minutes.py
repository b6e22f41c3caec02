"""`tools/make-venv` and `python -m datapipe`: what the first minutes meet."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAKE_VENV = ROOT / "tools" / "make-venv"
# makes what `make-venv` looks for, once the test says so
PYTHON = f"""#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec {sys.executable!r} "$@"
echo made >> made
read line < go
mkdir -p "$3/bin" && : > "$3/bin/pip" && chmod +x "$3/bin/pip"
"""


def test_a_second_make_waits_for_the_first(tmp_path: Path) -> None:
    """It would remove the environment that the first is about to make."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    os.mkfifo(tmp_path / "go")

    def make() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [MAKE_VENV, ".venv"], cwd=tmp_path, env=os.environ | {"PYTHON": str(python)},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with make() as first, (tmp_path / "go").open("w") as go, make() as second:
        # `open` has returned: the first is at it
        waits, _, _ = select.select([second.stderr], [], [], 20)
        go.write("\n\n")
        go.flush()
        assert first.wait(20) == 0
        assert second.wait(20) == 0
        assert waits
        assert second.stderr
        assert second.stderr.read() == "another make is installing here: waiting for it\n"
    assert (tmp_path / "made").read_text() == "made\n"


def test_without_what_it_needs_the_line_says_how_to_get_it() -> None:
    found = subprocess.run(
        [sys.executable, "-S", "-m", "datapipe"], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.startswith("datapipe: msgspec is not installed for ")
    assert "`make run`" in found.stderr
    assert found.stderr.count("\n") == 1


def test_ctrl_c_while_it_starts_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    found = subprocess.run(
        [sys.executable, "-m", "datapipe", "check"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        # in the background of a shell it would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (-signal.SIGINT, "")
