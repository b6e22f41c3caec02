"""What the pages name is there: tests, files, places in pages, commands, targets."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from datapipe.cli import main as cli
from tests.docs.pages import ROOT, everything, paths, read

_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")
_MAKE = re.compile(r"(?:^|\n)(?:\w+=\S+ )*make ([a-z-]+)")
_BESIDE = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


@pytest.mark.parametrize(("page", "least"), [("promises.md", 30), ("security.md", 20)])
def test_pages_name_their_tests(page: str, least: int) -> None:
    assert len(_TEST.findall((ROOT / "docs" / page).read_text())) >= least


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.name)
def test_each_test_that_is_named_exists(path: Path) -> None:
    for file, test in _TEST.findall(read(path).text):
        text = (ROOT / file).read_text()
        defined = not test or re.search(rf"^(async )?def {test}\(", text, re.MULTILINE)
        assert defined, f"{path.name} names {file}::{test}"


def test_each_promise_names_a_test() -> None:
    lines = (ROOT / "docs" / "promises.md").read_text().splitlines()
    heads = ("| promise | test |", "| --- | --- |")
    rows = [line for line in lines if line.startswith("|") and line not in heads]
    assert len(rows) >= len(lines) / 2
    assert all(_TEST.search(row) for row in rows), [r for r in rows if not _TEST.search(r)]


@pytest.mark.parametrize("path", [*paths(), *_BESIDE], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    page = read(path)
    for link in page.links:
        if re.match(r"https?:|data:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        assert target.exists(), f"{page.path.name} links to {link}"
        if anchor:
            assert anchor in read(target).anchors, f"{page.path.name} links to {link}"


def test_each_page_is_found_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in read(ROOT / "README.md").links}
    assert [path.name for path in paths()[1:] if path not in linked] == []
    for name in ("grafana.json", "alerts.yml"):
        assert ROOT / "docs" / name in linked


def test_commands_that_are_named_exist() -> None:
    """In `code` and in blocks: each has its place in the parser, and its options."""
    known = commands()
    for page in everything():
        blocks = [block.text for block in page.blocks if block.kind == "sh"]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for text in [*page.words, *lines]:
            text = text.replace("compose exec datapipe ", "")  # there it is a service's name
            for found in re.findall(r"(?:^|\s)datapipe ([a-z-][^|>#;&]*)", text):
                words = found.split()
                command = max((c for c in known if found.startswith(c)), key=len)
                options = {word for word in words if word.startswith("-") and word != "-"}
                place = f"{page.path.name}: {text}"
                assert command or words[0] in known[""], place
                assert options <= known[command], place


def commands() -> dict[str, set[str]]:
    """By the words of each command, its options; `dead list` is one."""
    found: dict[str, set[str]] = {}
    pending = [("", cli._parser())]
    while pending:
        name, parser = pending.pop()
        found[name.strip()] = {o for a in parser._actions for o in a.option_strings}
        for action in parser._actions:
            if isinstance(action.choices, dict):
                pending += [(f"{name} {word}", sub) for word, sub in action.choices.items()]
    return found


def test_targets_and_modules_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in map(read, [*paths(), *_BESIDE]):
        text = "\n".join([*page.words, *(b.text for b in page.blocks if b.kind == "sh")])
        assert set(_MAKE.findall(text)) <= targets, page.path.name
        for module in re.findall(r"python -m ((?:tests|benchmarks|datapipe)[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{page.path.name}: {module}"
