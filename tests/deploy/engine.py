"""podman, as Debian has it: builds the image from the files that are shipped, and runs it.

No registry is asked. What stands in for the base is Debian's own build of the same Python on the
same Debian, unpacked, and what pip installs was downloaded before, by its locks: see
`tools/image-needs`. Nothing else differs: the engine reads the Dockerfile and carries it out.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.deploy.environment import tracked_files
from tests.service import ROOT

CACHE = ROOT / ".cache" / "image"
BUILD, IMAGE = "localhost/datapipe-build", "localhost/datapipe"
# an unprivileged container, as compose.yaml and kubernetes.yaml have it, but for the network
SHUT = [
    "--network=host", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all",
    "--security-opt=no-new-privileges",
    # the engine's own are higher, and not for each root to have
    "--ulimit=nofile=4096:4096", "--ulimit=nproc=1024:1024",
]  # fmt: skip


def _run(*command: str, timeout_s: float = 300, fails: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
    assert fails or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


class Engine:
    """Use `running`. Containers are in a mount namespace of their own, which ends with it.

    In it there are no control groups: the engine needs none of them here, and whether they may be
    written differs from machine to machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._words: list[str] = []

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[Engine]:
        """One at a time. Args: folder: for its configuration, and what is built from."""
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "engine.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            _run(str(ROOT / "tools/image-needs"), timeout_s=600)  # it may have just begun
            engine = cls(folder)
            holder = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c",
                 "mount -t tmpfs none /sys/fs/cgroup && echo && exec cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert holder.stdout is not None
            assert holder.stdout.readline(), "no mount namespace"
            try:
                engine._set_up(holder.pid)
                yield engine
            finally:
                engine("rm", "--all", "--force", "--time=0", "--volumes")
                engine("volume", "prune", "--force")
                holder.communicate(timeout=30)

    def _set_up(self, holder: int) -> None:
        """Enter the namespace, with a configuration of our own."""
        conf = self._folder / "containers.conf"
        conf.write_text('[containers]\ncgroups = "disabled"\nlog_driver = "k8s-file"\n')
        self._words = [
            "nsenter", f"--mount=/proc/{holder}/ns/mnt", "env", f"CONTAINERS_CONF={conf}",
            str(ROOT / "tools/podman"),
        ]  # fmt: skip
        self("rm", "--all", "--force", "--time=0")  # of a run that was killed

    def __call__(self, *words: str, timeout_s: float = 120, fails: bool = False) -> str:
        """Run podman with these words; its output. Raises: AssertionError: it failed."""
        return _run(*self._words, *words, timeout_s=timeout_s, fails=fails)

    def build(self) -> None:
        """Build from the tracked files, in both stages; the first is kept, as it takes long."""
        context = self._folder / "context"
        tracked_files(context)
        pip = self._folder / "pip.conf"
        pip.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        words = [
            "build", "--quiet", "--isolation=chroot", "--network=host", "--pull=never",
            "--format=docker", f"--volume={CACHE}/wheels:/wheels:ro",
            f"--volume={pip}:/etc/pip.conf:ro",
        ]  # fmt: skip
        self(*words, "--target=build", f"--tag={BUILD}", str(context), timeout_s=400)
        self(*words, f"--tag={IMAGE}", str(context), timeout_s=400)
        self("image", "prune", "--force")  # of earlier builds

    def image(self) -> dict[str, Any]:
        """What the image says of itself."""
        found: dict[str, Any] = json.loads(self("image", "inspect", IMAGE))[0]
        return found["Config"] | {"Healthcheck": found["Healthcheck"]}

    def health_command(self) -> list[str]:
        """The program that says whether it is well, and its words."""
        kind, *words = self.image()["Healthcheck"]["Test"]
        assert kind == "CMD"  # no shell
        return words

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", container))[0]
        return found

    def once(self, *words: str, entry: str = "", options: Sequence[str] = ()) -> tuple[int, str]:
        """Run a container to its end: its exit code and what it printed. Args: entry: a program."""
        name = f"once-{uuid4().hex[:8]}"
        entries = [f"--entrypoint={entry}"] if entry else []
        self("run", "--name", name, *SHUT, *entries, *options, IMAGE, *words, fails=True)
        code = int(self.inspect(name)["State"]["ExitCode"])
        log = self.logs(name)
        self("rm", "--volumes", name)
        return code, log

    def logs(self, container: str) -> str:
        done = subprocess.run(
            [*self._words, "logs", container], capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr
