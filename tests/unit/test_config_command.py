"""`datapipe config`, `--config`, and commands in a folder where nothing is."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.cli.main import main

Run = Callable[..., tuple[int, str, str]]
SECRET = "postgresql://u:SECRET@h/d"


@pytest.fixture
def datapipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command in a folder of its own: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in os.environ if name.startswith(("DATAPIPE_", "IRON_"))]:
        monkeypatch.delenv(name)

    def run(*args: str, **env: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patched:
            for name, value in {"PORT": "", "DATABASE_URL": "", "DYNO": "", **env}.items():
                patched.setenv(name, value)
            try:
                code = main(args)
            except SystemExit as exc:  # of argparse
                code = int(str(exc.code))
        return (code, *capsys.readouterr())

    return run


def test_config(datapipe: Run, tmp_path: Path) -> None:
    """What is in force and where it came from; `--config` goes before the variable."""
    (tmp_path / "a").mkdir()
    named = tmp_path / "a" / "my.toml"
    named.write_text("load_workers = 7\nload_interval = 1\n")
    (tmp_path / "key").write_text("SECRET\n")
    env = {
        "DATAPIPE_CNF": "/nowhere.json", "DATAPIPE_LOAD_INTERVAL": "2", "DATABASE_URL": SECRET,
        "DATAPIPE_ADMIN_KEY_FILE": "key",
    }  # fmt: skip
    code, out, _ = datapipe("--config", str(named), "config", "--json", **env)
    found = json.loads(out)
    assert code == 0
    _, out, _ = datapipe("config", "--json", "--config", "a/my.toml", **env)
    assert {k: each["value"] for k, each in json.loads(out).items()} == {
        k: each["value"] for k, each in found.items()
    }
    shown = {key: (each["value"], each["source"]) for key, each in found.items()}
    assert shown["load_workers"] == (7, f"file {named}")
    assert shown["load_interval"] == (2, "variable DATAPIPE_LOAD_INTERVAL")
    assert shown["admin_key"] == ("***", "variable DATAPIPE_ADMIN_KEY_FILE, file key")
    assert shown["database_url"] == ("postgresql://u:***@h/d", "variable DATABASE_URL")
    assert shown["data_dir"] == (str(tmp_path / "a" / "var"), "default")

    code, out, _ = datapipe("config", "--config", str(named), **env)
    assert (code, "SECRET" in out) == (0, False)
    assert re.search(r'^mirror +"auto" \(journal\) +default$', out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (("config",), {}, "/nowhere.json can't be read"),
        (("config", "--config", ""), {}, "a file must be named"),
        (("dead", "--config", "/no.toml", "list"), {}, "/no.toml can't be read"),
        (
            ("check", "--config", "my.json"),
            {"DATAPIPE_ADMIN_KEY": "SECRET", "DATAPIPE_ADMIN_KEY_FILE": "key"},
            "leave one of them",
        ),
    ],
)
def test_a_wrong_file_is_one_clear_line(
    datapipe: Run, tmp_path: Path, args: tuple[str, ...], env: dict[str, str], words: str
) -> None:
    (tmp_path / "my.json").write_text("{}")
    code, out, err = datapipe(*args, DATAPIPE_CNF="/nowhere.json", **env)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert "SECRET" not in err


@pytest.mark.parametrize(
    ("args", "folder"),
    [
        (("load",), "journal"), (("dead", "list"), "postgres"), (("unknown", "list"), "postgres"),
        (("schema", "--apply"), "postgres"), (("schema", "--adopt", "install"), "postgres"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_named_and_stays_empty(
    datapipe: Run, tmp_path: Path, args: tuple[str, ...], folder: str
) -> None:
    """Nothing waits where nobody has been: that is no success, and makes no folder."""
    url = SECRET if args == ("load",) else ""
    code, out, err = datapipe(*args, DATABASE_URL=url)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"{tmp_path}/var/{folder} is not there" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shelf", ["dead", "unknown"])
def test_to_look_into_a_file_does_not_make_it(datapipe: Run, tmp_path: Path, shelf: str) -> None:
    code, out, err = datapipe(shelf, "list", DATABASE_URL="sqlite:///events.db")
    assert (code, out) == (1, "")
    assert f"{tmp_path}/events.db is not there" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "check", "load", "status"])
def test_events_of_1_0_stop_the_start_and_check(
    datapipe: Run, tmp_path: Path, command: str
) -> None:
    """Which had its folder in the working folder, whatever settings file was named."""
    (tmp_path / "var" / "journal").mkdir(parents=True)
    (tmp_path / "var" / "journal" / "0.sqlite").touch()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my.toml").write_text("database_url = 'postgresql://127.0.0.1:1/x'")
    code, out, err = datapipe(command, "--config", "conf/my.toml")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"move {tmp_path}/var to {tmp_path}/conf/var" in err
    assert not (tmp_path / "conf" / "var").exists()
