"""A release is one number, in all places where people look; and its package holds all of it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from datapipe import __version__
from tests.docs.pages import ROOT, read

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_the_changelog_begins_with_this_version_and_its_day() -> None:
    releases = re.findall(r"^## (\S+)(.*)$", CHANGELOG, re.MULTILINE)
    if releases[0] == ("Unreleased", ""):
        del releases[0]
    assert releases[0][0] == __version__
    assert all(re.fullmatch(r" \(2\d{3}-\d\d-\d\d\)", day) for _, day in releases), releases
    numbers = [tuple(map(int, version.split("."))) for version, _ in releases]
    assert numbers == sorted(numbers, reverse=True)


def test_pages_are_of_this_version() -> None:
    major, minor, _ = __version__.split(".")
    assert f"{major}.{minor}" in read(ROOT / "docs/upgrade.md").headings[0]
    assert f"{major}.x" in (ROOT / "SECURITY.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """As pip builds it of a checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("datapipe", "templates"):
        for file in files(name):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    alone = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*pip, *alone, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def files(folder: str) -> list[Path]:
    found = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts]


def test_the_wheel_holds_every_module_and_template(wheel: zipfile.ZipFile) -> None:
    wanted = {str(path) for path in files("datapipe")}
    wanted |= {f"datapipe/{path}" for path in files("templates")}
    info = f"datapipe-{__version__}.dist-info"
    packed = {name for name in wheel.namelist() if not name.startswith(info)}
    assert packed == wanted
    told = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {__version__}\n" in told
    assert "datapipe = datapipe.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
