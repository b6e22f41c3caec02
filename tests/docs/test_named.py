"""The docs name tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")


@pytest.mark.parametrize(("page", "least"), [("promises.md", 30), ("security.md", 20)])
def test_each_test_that_is_named_exists(page: str, least: int) -> None:
    named = _NAMED.findall((ROOT / "docs" / page).read_text())
    assert len(named) >= least
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / file).read_text(), re.MULTILINE), (
            f"{page} names {file}::{test}"
        )


def test_each_promise_names_a_test() -> None:
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows
    assert all(_NAMED.search(row) for row in rows), [r for r in rows if not _NAMED.search(r)]
    assert "docs/promises.md" in (ROOT / "README.md").read_text()
