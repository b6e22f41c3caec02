"""A mirror and a sink of somebody else's, in a package of their own, found by its entry points."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest

from datapipe import settings
from datapipe.errors import ConfigError
from datapipe.mirrors import open_mirror
from datapipe.mirrors.memory import MemoryPlugin
from datapipe.settings import Settings
from datapipe.sinks.postgres.sink import PostgresPlugin
from tests.packages import install
from tests.service import ROOT, Service

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "somebody-elses"
version = "1.0"

[project.entry-points."datapipe.mirrors"]
shelf = "somebody_elses:Shelf"
broken = "somebody_elses_broken:Shelf"
missing = "somebody_elses:Missing"
no-plugin = "somebody_elses:Lock"

[project.entry-points."datapipe.sinks"]
shelf = "somebody_elses:Rows"

[tool.setuptools]
py-modules = ["somebody_elses", "somebody_elses_broken"]
"""

MODULE = """
from typing import Annotated, Literal

from msgspec import Meta, Struct

from datapipe.mirrors import MirrorPlugin
from datapipe.mirrors.memory import MemoryPlugin
from datapipe.sinks import SinkPlugin
from datapipe.sinks.memory import MemoryDatabase


class Lock(Struct, forbid_unknown_fields=True):
    code: int
    kind: Literal["padlock", "bolt"] = "bolt"


class Shelf(MirrorPlugin):
    folder: str
    boards: Annotated[int, Meta(ge=1)] = 3
    wood: Literal["oak", "pine"] = "oak"
    lock: Lock | None = None

    def open(self, settings, process):
        return MemoryPlugin().open(settings, process)

    async def check(self, settings):
        return [("ok", f"shelf: {self.boards} boards in {self.folder}")]


class Rows(SinkPlugin):
    def open(self, settings, process):
        return MemoryDatabase().open(settings, process)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to have on the path, with the package installed into it."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "package"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "somebody_elses.py").write_text(MODULE)
    (source / "somebody_elses_broken.py").write_text("import of_what_is\n")
    install(source, folder / "installed")
    return folder / "installed"


@pytest.fixture
def found(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(packages))


def load(tmp_path: Path, **values: Any) -> Settings:
    file = tmp_path / "my.json"
    file.write_text(json.dumps(values))
    return settings.load(environ={"DATAPIPE_CNF": str(file)})


async def test_a_service_on_somebody_elses_mirror_and_sink(packages: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(packages)])
    options = {"mirror": "shelf", "mirror_options": {"folder": "a", "boards": 7}}
    service = Service(
        tmp_path, {"PYTHONPATH": path}, database_url="shelf://anywhere", **options
    )  # fmt: skip
    try:
        await service.start()
        assert (await service.post({"event_name": "install", "user_id": 1, "timestamp": 2}))[
            0
        ] == 200
        await service.drained()
        books = (await service.status())["books"]
        assert (books["accepted"], books["loaded"], books["balanced"]) == (1, 1, True)
        assert await service.stop() == 0
        assert [line["mirror"] for line in service.logged("listening")] == ["shelf"]
    finally:
        await service.close()
    check = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "datapipe", "check", cwd=tmp_path, stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": path, "DATAPIPE_CNF": str(service.file)},
    )  # fmt: skip
    said, _ = await check.communicate()
    assert check.returncode == 0
    assert said.decode().splitlines()[1:] == [
        "ok    database: in memory", "ok    shelf: 7 boards in a"
    ]  # fmt: skip


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mirror": "shelve"}, ["mirror (from file", "'shelve'", "auto", "journal", "shelf"]),
        ({"database_url": "rows://h"}, ["database_url (from file", "postgresql://", "shelf://"]),
        ({"mirror": "shelf"}, ["mirror_options.folder", "must be given"]),
        (
            {"mirror": "shelf", "mirror_options": {"foldr": "S3CRET"}},
            ["mirror_options.foldr: no such setting (file", "my.json", "'folder'"],
        ),
        (
            {"mirror": "shelf", "mirror_options": {"folder": "a", "boards": "S3CRET"}},
            ["mirror_options.boards (from file", "my.json", "a whole number of at least 1"],
        ),
        (
            {"mirror": "shelf", "mirror_options": {"folder": "a", "wood": "S3CRET"}},
            ["mirror_options.wood (from file", "one of oak, pine"],
        ),
        (
            {"mirror": "shelf", "mirror_options": {"folder": "a", "lock": {"code": "S3CRET"}}},
            ["mirror_options.lock.code (from file", "int"],
        ),
        (
            {
                "mirror": "shelf",
                "mirror_options": {"folder": "a", "lock": {"code": 1, "kind": "S3CRET"}},
            },
            ["mirror_options.lock.kind (from file", "Invalid enum value"],
        ),
        (
            {"mirror": "shelf", "mirror_options": {"folder": "a", "lock": {"cod": "S3CRET"}}},
            ["mirror_options.lock.cod: no such setting (file"],
        ),
        ({"database_url": "shelf://", "sink_options": {"a": "S3CRET"}}, ["sink_options.a", "none"]),
        ({"mirror_options": {"a": "S3CRET"}}, ["mirror_options.a: no such", "there are none"]),
        (
            {"mirror": "broken"},
            [
                "mirror (from file", "somebody_elses_broken:Shelf", "of somebody-elses",
                "ModuleNotFoundError", "of_what_is",
            ],
        ),
        ({"mirror": "missing"}, ["somebody_elses:Missing", "AttributeError", "Missing"]),
        ({"mirror": "no-plugin"}, ["somebody_elses:Lock", "is not a Plugin"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_clear_line(
    tmp_path: Path, values: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, **values)
    text = str(refused.value)
    assert "\n" not in text
    assert "S3CRET" not in text
    assert "lock.cod" not in text or "nearest" not in text  # that one's neighbours are not known
    for word in words:
        assert word in text


@pytest.mark.usefixtures("found")
def test_what_is_broken_harms_nobody_who_does_not_name_it(tmp_path: Path) -> None:
    assert load(tmp_path, mirror="shelf", mirror_options={"folder": "a"}).mirror_kind == "shelf"
    assert load(tmp_path).mirror_kind == "journal"


@pytest.mark.usefixtures("found")
async def test_options_are_values_of_the_types_that_were_declared() -> None:
    options = {"folder": "a", "lock": {"code": 7}}
    made = settings.plugin(Settings(mirror="shelf", mirror_options=options), "mirror")
    assert (made.folder, made.boards, made.lock.code) == ("a", 3, 7)
    async with open_mirror(Settings(mirror="shelf", mirror_options=options), "p") as mirror:
        assert not mirror.traits.durable


def test_two_packages_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is meant can't be known."""
    twice = [EntryPoint("shelf", f"{each}:Plugin", "datapipe.mirrors") for each in ("a", "b")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: twice)
    with pytest.raises(ConfigError, match="'shelf' is the name of a:Plugin and b:Plugin"):
        settings.plugin(Settings(mirror="shelf"), "mirror")


def test_ours_are_found_though_datapipe_is_not_installed_and_nobody_takes_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A deployment runs the checkout, and installs nothing but what it needs."""
    theirs = [EntryPoint(name, "a:Plugin", "") for name in ("none", "postgresql")]
    for installed in ([], theirs):
        monkeypatch.setattr(metadata, "entry_points", lambda group, found=installed: found)
        assert type(settings.plugin(Settings(mirror="none"), "mirror")) is MemoryPlugin
        assert type(settings.plugin(Settings(), "sink")) is PostgresPlugin


@pytest.mark.parametrize("room", ["mirror", "sink"])
def test_all_of_ours_can_be_imported(room: Literal["mirror", "sink"]) -> None:
    for name in settings.OURS[room]:
        chosen = {"mirror": name} if room == "mirror" else {"database_url": f"{name}://host/db"}
        assert isinstance(settings.plugin(Settings(**chosen), room), settings.Plugin)
