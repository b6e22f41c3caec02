"""What people read has the words of people; those of the code stay in names, keys and the log."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import datapipe

ROOT = Path(datapipe.__file__).parent
# "mirror" is also a setting, which may be named
CODE_WORD = re.compile(
    r"(?<![-{\"`])\b(lanes?|parked|segments?|(?<!set )mirrors?(?! '| to | is | set ))\b(?![:,.])"
)
# SQL; names of modules; a phrase of the log
NOT_TOLD = re.compile(r"\b[A-Z]{4,} |=|^[\w.:]+$|^position, |^mirror not kept$")


def printed(tree: ast.AST) -> Iterator[str]:
    """Texts of a few words in the code: neither docstrings, nor SQL, nor fixed phrases of logs."""
    passed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed.add(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
            passed.update(node.args)
        if isinstance(node, ast.JoinedStr):
            passed.update(each for each in ast.walk(node) if each is not node)
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr) and node not in passed:
            text = "".join(e.value if isinstance(e, ast.Constant) else "{}" for e in node.values)
        elif isinstance(node, ast.Constant) and node not in passed:
            text = node.value if isinstance(node.value, str) else ""
        if len(re.findall(r"\b[a-z]+\b", text)) > 2 and not NOT_TOLD.search(text):
            yield text


def code_words(text: str) -> list[str]:
    """Of a file's text."""
    return [each for each in printed(ast.parse(text)) if CODE_WORD.search(each)]


def test_what_is_printed_has_no_words_of_the_code() -> None:
    found = {
        str(path.relative_to(ROOT)): texts
        for path in sorted(ROOT.rglob("*.py"))
        if (texts := code_words(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ('print(f"the lane {name} is full")', 1),
        ('raise Busy("what waits in the mirror alone")', 1),
        ('log.error("segments missing in the mirror", error="two lanes are full")', 1),
        ('"""About the lanes of a mirror."""', 0),
        ('sql = "DELETE FROM t WHERE lane = 1"', 0),
        ('why = "mirror: none is a choice"', 0),
    ],
)
def test_a_word_of_the_code_is_seen(code: str, seen: int) -> None:
    assert len(code_words(code)) == seen
