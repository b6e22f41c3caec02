"""What there is, is in the docs: settings, metrics, commands, paths, status codes, log phrases."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from aiohttp.test_utils import TestServer
from msgspec import inspect

from datapipe import create_app, settings
from datapipe.errors import Reason
from datapipe.events.types import PG_TYPES
from datapipe.http.assets import FILES
from datapipe.monitor.metrics import REASONS
from datapipe.monitor.summary import WORDS, WORK, work_words
from datapipe.settings import Settings
from datapipe.sinks.memory import MemoryDatabase
from tests.docs.metrics import exposed, families
from tests.docs.pages import ROOT, read
from tests.docs.test_named import commands

DOCS = ROOT / "docs"
_LOGS = re.compile(r"(?:log|_logger\(\))\.(info|warning|error|critical|exception)")


def rows(page: str) -> list[list[str]]:
    """The cells of all tables of a page."""
    lines = (DOCS / page).read_text().splitlines()
    tables = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in tables]


def code() -> Iterator[ast.Call]:
    """All calls in datapipe/."""
    for file in (ROOT / "datapipe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield node


def constants(node: ast.expr) -> list[Any]:
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]


# --- settings ---


def settings_types() -> dict[str, inspect.Type]:
    described = inspect.type_info(Settings)
    assert isinstance(described, inspect.StructType)
    return {field.name: field.type for field in described.fields}


def test_every_setting_stands_in_the_table_with_its_default() -> None:
    told = {row[0].strip("`"): row[1:3] for row in rows("settings.md") if len(row) == 4}
    told = {key: cells for key, cells in told.items() if re.fullmatch(r"[a-z_]+", key)}
    told.pop("key")
    assert told.keys() == set(Settings.__struct_fields__)
    types = settings_types()
    for key, (default, least) in told.items():
        value = getattr(Settings(), key)
        assert json.loads(default.strip("`")) == value, key
        bound = getattr(types[key], "ge", None)
        assert least == ("" if bound is None else f"{bound:.15g}"), key


def test_every_source_and_choice_is_named() -> None:
    words = set(read(DOCS / "settings.md").words)
    assert {
        "DATAPIPE_CNF",
        str(settings.SYSTEM_FILE),
        *settings.PLATFORM,
        *settings.SECRETS,
    } <= words
    choices: dict[str, set[Any]] = {"mirror": {"auto"}, "database_url": set()}
    for key, kind in settings_types().items():
        if isinstance(kind, inspect.LiteralType):
            choices[key] = set(kind.values)
    choices["mirror"] |= settings.OURS["mirror"].keys()
    schemes = {f"{name}://" for name in settings.OURS["sink"]}
    choices["database_url"] |= schemes - {"sqlite://"} | {"sqlite:///"}  # a path follows
    assert all(choices.values())
    assert len(choices) == 5
    for key, wanted in choices.items():
        (row,) = [row for row in rows("settings.md") if row[0] == f"`{key}`"]
        told = set(re.findall(r"`([\w:/]+)`", row[3])) | {row[1].strip('`"')}
        assert wanted <= told, key


# --- commands ---


def test_every_command_and_option_is_named() -> None:
    text = (DOCS / "commands.md").read_text()
    page = read(DOCS / "commands.md")
    for command, options in commands().items():
        if command:
            assert command.split()[0] in page.headings, command
            assert all(word in text for word in command.split()), command
        for option in options - {"--try-out"}:  # what `make run` says, and nobody else
            assert option in text, f"{command} {option}"


# --- HTTP ---


async def test_every_path_is_named(tmp_path: Path) -> None:
    words = read(DOCS / "http.md").words
    app = create_app(
        Settings(mirror="none", data_dir=str(tmp_path), cors_origins=["*"]),
        open_sink=MemoryDatabase().open,
    )
    async with TestServer(app):
        routes = {(r.method, r.resource.canonical) for r in app.router.routes() if r.resource}
    assert len(routes) > 10
    for method, path in routes:
        if path.lstrip("/") not in FILES and method != "HEAD":
            assert f"{method} {path}" in words, f"{method} {path}"


def test_every_status_and_code_is_in_the_table() -> None:
    told = {(row[0], row[1]) for row in rows("http.md") if len(row) == 3}
    used = {("200", "0"), ("207", "1")}
    used |= {(str(reason.status), str(reason.code)) for reason in Reason}
    for call in code():
        name = ast.unparse(call.func).split(".")[-1]
        numbers = [a.value if isinstance(a, ast.Constant) else None for a in call.args]
        if name in ("EventRejected", "Refused") and len(numbers) > 2 and numbers[2]:
            reason = Reason[ast.unparse(call.args[0]).removeprefix("Reason.")]
            used.add((str(numbers[2]), str(reason.code)))
        elif name == "answer" and len(numbers) > 1 and isinstance(numbers[1], int):
            used |= {(str(numbers[0]), str(numbers[1]))} if numbers[0] else set()
    assert len(used) > 12
    assert sorted(used - told) == []


# --- operations ---


def phrases() -> dict[str, str]:
    """What the code logs at info and above, with its level."""
    found: dict[str, str] = {}
    for file in (ROOT / "datapipe").rglob("*.py"):
        tree = ast.parse(file.read_text())
        assigned = {
            ast.unparse(node.targets[0]): node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(tree):
            called = _LOGS.fullmatch(ast.unparse(node.func)) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and called:
                text = assigned.get(ast.unparse(node.args[0]), node.args[0])
                level = called[1].replace("exception", "error")
                found |= {each: level for each in constants(text) if isinstance(each, str)}
    return found


def test_every_log_phrase_is_told() -> None:
    table = rows("operations.md")
    told = {phrase for row in table for phrase in re.findall(r"`([^`]+)`", row[0])}
    used = phrases()
    assert len(used) > 25
    assert sorted(used.keys() - told) == []
    for phrase, level in used.items():
        (row,) = [row for row in table if f"`{phrase}`" in row[0]]
        assert level in row[1] or level in row[2], f"{phrase}: {level}"


def test_every_phrase_that_is_told_is_logged() -> None:
    text = "".join(file.read_text() for file in (ROOT / "datapipe").rglob("*.py"))
    for row in rows("operations.md"):
        if len(row) == 3 and re.search(r"info|warning|error|critical", row[1]):
            for phrase in re.findall(r"`([^`]+)`", row[0]):
                assert f'"{phrase}"' in text, phrase


def test_every_metric_and_label_is_told() -> None:
    told: dict[str, set[str]] = {}
    for row in rows("operations.md"):
        for name, labels in re.findall(r"`(datapipe_\w+)(?:\{([\w,]+)\})?`", row[0]):
            told[name] = set(labels.split(",")) - {""}
    assert told.keys() == families()
    samples = exposed()
    for name, labels in told.items():
        assert labels == samples.get(name, set()) - {"le"}, name
    (row,) = [row for row in rows("operations.md") if "rejected_total" in row[0]]
    assert set(REASONS) == set(re.findall(r"`(\w+)`", row[1]))


def test_every_alert_has_a_heading_of_its_own() -> None:
    content = yaml.safe_load((DOCS / "alerts.yml").read_text())
    alerts = {rule["alert"] for group in content["groups"] for rule in group["rules"]}
    assert alerts == {h for h in read(DOCS / "operations.md").headings if h.startswith("Datapipe")}


def test_every_state_is_told() -> None:
    states = {"healthy", *(words.state for words in WORDS.values())}
    states |= {work_words(part, slow).state for part in WORK for slow in (False, True)}
    told = [re.findall(r"`(\w+)`", row[0]) for row in rows("operations.md") if len(row) == 3]
    assert states == {word for words in told for word in words if word in states}
    (row,) = [row for row in rows("status.md") if row[0] == "`summary.state`"]
    assert states <= set(re.findall(r"`(\w+)`", row[1]))


# --- events ---


def test_every_type_is_told() -> None:
    told = {row[0]: row[1] for row in rows("events.md") if len(row) == 3}
    for kind, column in PG_TYPES.items():
        (found,) = [value for key, value in told.items() if f"`{kind.__name__}`" in key]
        assert found == column


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 250
