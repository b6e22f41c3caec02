"""The small files of a deployment say what the service understands."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from datapipe import settings
from datapipe.cli.main import _parser
from datapipe.events.registry import load_registry
from tests.deploy.shipped import installed, moved
from tests.service import ROOT

# what the unit may say: systemd only warns of a word that it does not know
KEYS = {
    "Unit": {"Description", "After", "Wants", "StartLimitIntervalSec"},
    "Install": {"WantedBy"},
    "Service": {
        "Type", "WatchdogSec", "User", "WorkingDirectory", "ExecStart", "ExecReload",
        "EnvironmentFile", "Environment",
        "StateDirectory", "StateDirectoryMode", "UMask", "Restart", "RestartSec",
        "RestartPreventExitStatus", "KillMode", "TimeoutStopSec", "LimitNOFILE", "MemoryMax",
        "OOMPolicy", "CapabilityBoundingSet", "NoNewPrivileges", "ProtectSystem", "ProtectHome",
        "PrivateTmp", "PrivateDevices", "ProtectClock", "ProtectControlGroups", "ProtectHostname",
        "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc",
        "ProcSubset", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime",
        "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute",
        "SystemCallArchitectures", "SystemCallFilter", "SystemCallErrorNumber",
    },
}  # fmt: skip
EXPOSURE = 20  # tenths, as `systemd-analyze security` counts: 0 is shut, 100 is open


def understood(command: str) -> bool:
    """Whether a line that starts us is one of ours, and its options are known."""
    words = shlex.split(command.removeprefix("exec "))
    assert words[0].rpartition("/")[2] == "python", command
    assert words[1:3] == ["-m", "datapipe"], command
    return _parser().parse_args(words[3:]).command is not None


def test_the_procfile_starts_what_there_is() -> None:
    lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    assert list(lines) == ["release", "web"]
    assert all(understood(command) for command in lines.values())
    # a shell between would hear the signals in our place
    assert all(command.startswith("exec ") for command in lines.values())


def test_the_button_asks_for_settings_that_there_are() -> None:
    app = json.loads((ROOT / "app.json").read_text())
    assert {each.partition(":")[0] for each in app["addons"]} == {"heroku-postgresql", "iron_mq"}
    assert len(app["name"]) <= 30
    assert len(app["description"]) <= 140
    added = {"DYNO": "web.1", "IRON_MQ_PROJECT_ID": "p", "IRON_MQ_TOKEN": "t"}
    answered = {name: each.get("value", "") for name, each in app["env"].items()}
    assert settings.load(environ={**added, **answered}) == settings.load(environ=added)
    assert all(each["description"] for each in app["env"].values())
    example = re.search(r": ({.*})$", app["env"]["DATAPIPE_EVENTS"]["description"])
    assert example is not None
    found = settings.load(environ={**added, "DATAPIPE_EVENTS": example[1]})
    assert "signup" in load_registry(found).types


def test_the_python_is_named_by_major_and_minor() -> None:
    text = (ROOT / ".python-version").read_text()
    assert re.fullmatch(r"3\.\d+\n", text)
    assert tuple(map(int, text.split("."))) >= (3, 11)


def test_the_lock_has_all_that_we_need() -> None:
    lock = (ROOT / "requirements.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE)
    locked = {canonicalize_name(name): version for name, version in pinned}
    wanted = [Requirement(text) for text in requires("datapipe") or []]
    extras = ("", "mysql", "nats")  # what an image, and machines of a cluster, are made of
    needed = [
        each
        for each in wanted
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    assert {"nats-py", "pymysql", "psycopg2-binary"} <= {each.name for each in needed}
    assert len(needed) >= 10
    for each in needed:
        assert each.specifier.contains(locked[canonicalize_name(each.name)]), f"{each}: make lock"


def unit() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read(ROOT / "deploy/datapipe.service")
    return parsed


def test_the_unit_says_what_systemd_knows() -> None:
    parsed = unit()
    assert {name: set(parsed[name]) for name in parsed.sections()} == KEYS
    assert understood(parsed["Service"]["ExecStart"])
    assert parsed["Service"]["Type"] == "notify"
    # blocked for so long it must be: the longest that one body holds up others is 0.2 s
    assert 10 <= float(parsed["Service"]["WatchdogSec"]) <= 60
    # a wrong setting ends `serve` with 2; the last loads take shutdown_timeout, and a little
    assert parsed["Service"]["RestartPreventExitStatus"] == "2"
    assert float(parsed["Service"]["TimeoutStopSec"]) > settings.Settings().shutdown_timeout + 5
    assert parsed["Service"]["KillMode"] == "mixed"


def test_the_unit_as_systemd_sees_it(tmp_path: Path) -> None:
    """Where systemd is at hand it has the last word."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        return test_the_unit_says_what_systemd_knows()
    file = moved("datapipe.service", tmp_path, {"/opt/datapipe": installed(tmp_path)})
    verified = subprocess.run([tool, "verify", str(file)], capture_output=True, text=True)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    if "--offline" not in subprocess.run([tool, "--help"], capture_output=True, text=True).stdout:
        return None  # before 250 it judges only what is loaded
    security = [tool, "security", "--offline=true", f"--threshold={EXPOSURE}", str(file)]
    told = subprocess.run(security, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr
    return None


def test_gunicorns_master_holds_no_old_code() -> None:
    """What it imported, its workers would have for ever."""
    look = "import runpy, sys; runpy.run_path(sys.argv[1]); print('datapipe' in sys.modules)"
    file = str(ROOT / "deploy/gunicorn.conf.py")
    done = subprocess.run([sys.executable, "-c", look, file], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_gunicorn_is_patient_enough() -> None:
    """Its own check of the file; and it waits for the last loads."""
    check = [sys.executable, "-m", "gunicorn", "--print-config", "-c", "deploy/gunicorn.conf.py"]
    done = subprocess.run(
        [*check, "datapipe.app:gunicorn_app"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"^(\w+) += (.+)$", done.stdout, re.MULTILINE))
    assert float(said["graceful_timeout"]) > settings.Settings().shutdown_timeout
    assert float(said["timeout"]) > float(said["graceful_timeout"])
