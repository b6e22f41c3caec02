"""The README and docs/*.md as readers have them: blocks, links, headings, words of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"<!--\s*(not run|exit):\s*(.+?)\s*-->")


@dataclass
class Block:
    """A fenced block: ```kind file, with the marks of a comment right above it.

    Attributes:
        file: the name that the block is written under, for the blocks behind it.
        not_run: why it is not run, or None.
        exit: the exit code that its commands have.
        before: the prose since the last block.
    """

    page: Path
    line: int
    kind: str
    file: str
    text: str
    not_run: str | None = None
    exit: int = 0
    before: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass
class Page:
    """Attributes: words: what stands in `code`. prose: other text. links: targets. anchors: own."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    headings: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.path.read_text()


def paths() -> list[Path]:
    """The README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def read(path: Path) -> Page:
    """Raises: AssertionError: it has an indented block, or a mark that marks nothing."""
    page = Page(path)
    before: list[str] = []
    mark: re.Match[str] | None = None
    heading = False
    for token in MarkdownIt().enable("table").parse(path.read_text()):
        line = (token.map or [0])[0] + 1
        if mark and token.type != "fence" and token.map:
            raise AssertionError(f"{path.name}:{line}: {mark[0]} stands before no block")
        if token.type == "html_block":
            mark = _MARK.match(token.content)
            page.links += _Sources.of(token.content)
        elif token.type == "fence":
            page.blocks.append(_block(path, line, token, mark, " ".join(before)))
            before, mark = [], None
        elif token.type == "code_block":
            raise AssertionError(f"{path.name}:{line}: write blocks between ```")
        elif token.type == "heading_open":
            heading = True
        elif token.type == "inline":
            before.append(token.content)
            if heading:
                page.headings.append(token.content)
                page.anchors.add(_anchor(token.content))
                heading = False
            _inline(page, token)
    assert mark is None, f"{path.name}: {mark and mark[0]} stands before no block"
    return page


def _block(path: Path, line: int, token: Token, mark: re.Match[str] | None, before: str) -> Block:
    kind, _, file = token.info.strip().partition(" ")
    block = Block(path, line, kind, file.strip(), token.content, before=before)
    if mark and mark[1] == "not run":
        block.not_run = mark[2]
    elif mark:
        block.exit = int(mark[2])
    return block


def _inline(page: Page, token: Token) -> None:
    for child in token.children or []:
        if child.type == "code_inline":
            page.words.append(child.content)
        elif child.type == "text":
            page.prose.append(child.content)
        elif child.type == "link_open":
            page.links.append(str(child.attrGet("href")))
        elif child.type == "image":
            page.links.append(str(child.attrGet("src")))
        elif child.type == "html_inline":
            page.links += _Sources.of(child.content)


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


class _Sources(HTMLParser):
    """What HTML in a page points to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v for k, v in attrs if k in ("src", "srcset", "href") and v]

    @classmethod
    def of(cls, html: str) -> list[str]:
        parser = cls()
        parser.feed(html)
        return parser.found


def everything() -> Iterator[Page]:
    for path in paths():
        yield read(path)
