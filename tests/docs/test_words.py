"""The pages speak the words of people; those of the code stand in `code`, and in the glossary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.metrics import NUMBERS
from tests.docs.pages import ROOT, paths, read

GLOSSARY = ROOT / "docs" / "glossary.md"
# what the code says, and what people say
WORDS = {
    "lane": "event type",
    "segment": "batch",
    "parked": "on disk only",
    "books": "accounted for",
    "mirror": "durable queue",
    "refused at ingest": "rejected",
}
_OF_THE_CODE = {"architecture.md", GLOSSARY.name}
_CODE_WORD = re.compile(rf"\b({'|'.join(WORDS)})s?\b", re.IGNORECASE)
_SPEAKING = [path for path in paths() if path.name not in _OF_THE_CODE]


def code_words(path: Path) -> list[str]:
    """Where the prose of a page has a word of the code."""
    return [text for text in read(path).prose if _CODE_WORD.search(text)]


@pytest.mark.parametrize("path", _SPEAKING, ids=lambda path: path.name)
def test_prose_has_no_words_of_the_code(path: Path) -> None:
    assert code_words(path) == [], WORDS


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.name)
def test_a_page_begins_with_what_it_is_for(path: Path) -> None:
    title, _, sentence = path.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert re.match(r"\w|`|\[", sentence), sentence


def test_a_word_of_the_code_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Two lanes\n\n`lane`, a plane; [mirror](lane.md)\n\n```sh\nlane\n```\n")
    assert code_words(page) == ["Two lanes", "mirror"]


def test_the_glossary_has_both_words() -> None:
    page = read(GLOSSARY)
    for code, people in WORDS.items():
        assert people in " ".join(page.prose)
        assert code == "refused at ingest" or code in " ".join(page.words)
    assert {*NUMBERS, "blocked", "full", "balanced", "datapipe_ledger"} <= set(page.words)
