"""Event modules that change the service for a test: a name that is gone must not go unnoticed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import ROOT

MODULES = Path(__file__).parent / "modules"
PATCHES = {
    "a constant": 'patch(coordinator, "GONE_S", 1)',
    "a method": 'patch(coordinator.Coordinator, "gone", None)',
    "a text": 'patch_text(coordinator, "gone", "a", "b")',
    "a part of a text": 'patch_text(coordinator, "__doc__", "these words are gone", "b")',
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_name_that_is_gone_ends_the_service_at_its_start(tmp_path: Path, name: str) -> None:
    (tmp_path / "patches.py").write_text(
        "from datapipe.pipeline import coordinator\n"
        "from tests.fault.modules.patching import patch, patch_text\n"
        f"{PATCHES[name]}\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "datapipe", "serve", "--port", "0"], cwd=tmp_path, text=True,
        env={"PYTHONPATH": str(ROOT), "DATAPIPE_EVENT_MODULES": '["patches"]'},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stdout
    assert "datapipe.pipeline.coordinator" in ended.stdout or "Coordinator" in ended.stdout
    assert "gone" in ended.stdout.lower()


@pytest.mark.parametrize("file", sorted(MODULES.glob("*.py")), ids=lambda file: file.stem)
def test_each_module_patches_that_way(file: Path) -> None:
    """None of them assigns to what is not its own."""
    if file.stem == "patching":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            foreign = [each for each in targets if isinstance(each, ast.Attribute)]
            foreign = [each for each in foreign if getattr(each.value, "id", "") != "self"]
            assert not foreign, f"line {node.lineno}: by `patch`, so that a gone name is noticed"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "setattr", f"line {node.lineno}: by `patch`"
