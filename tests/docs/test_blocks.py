"""Every block of every page does what the page says, in the order in which one reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, Page, everything, paths, read
from tests.docs.stage import Stage
from tests.postgres import Postgres

# Why a block may go unrun, and what each of its lines must look like then.
NOT_RUN = {
    "needs a Heroku account": r"heroku .*|git push heroku .*",
    "installs packages": r"(python -m )?pip install .*",
    "needs the network": r"git clone .*|cd \S+",
    "is run by tests/deploy": r".* -m gunicorn .*",
    "is run by tests/integration": r"make run-cluster",
    "needs a container engine": r"(docker|kubectl) .*|\./deploy/make-secrets",
    "needs root": r"sudo .*|apt(-get)? .*",
    "takes long": r"make (test|bench|torture|screenshots|lock)|python -m (benchmarks|tests\.\S+).*",
}
OWN_DATABASE = {"README.md"}  # pages on which the service brings its own PostgreSQL


@pytest.fixture
def folder() -> Iterator[Path]:
    """A reader's folder, which the server of an embedded PostgreSQL can enter."""
    made = Path(tempfile.mkdtemp(prefix="datapipe-docs-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def why_not(block: Block) -> str | None:
    """Why it need not be run: as its mark says, or by its commands."""
    heroku = [re.match("heroku |git push heroku ", line) for line in commands(block)]
    if block.not_run is None and block.kind == "sh" and heroku and all(heroku):
        return "needs a Heroku account"
    return block.not_run


def commands(block: Block) -> list[str]:
    text = block.text.replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.name)
async def test_blocks(path: Path, postgres: Postgres, folder: Path) -> None:
    database = "" if path.name in OWN_DATABASE else postgres.create_database()
    stage = Stage(folder, database, postgres.bin)
    blocks = read(path).blocks
    try:
        for block in blocks:
            if (reason := why_not(block)) is None:
                await stage.run(block)
                continue
            assert reason in NOT_RUN, f"{block.place}: {reason!r} is no reason known here"
            for line in commands(block):
                assert re.fullmatch(NOT_RUN[reason], line), f"{block.place}: {reason}? {line}"
            subprocess.run(["bash", "-n"], input=block.text.encode(), check=True)
    finally:
        await stage.stop()


def test_the_pages_are_found() -> None:
    found = {page.path.name: len(page.blocks) for page in everything()}
    assert {"README.md", "clients.md", "events.md", "operations.md", "faq.md"} <= found.keys()
    for name in ("README.md", "clients.md", "events.md"):
        assert found[name] >= 4, name


@pytest.mark.parametrize(
    ("markdown", "error"),
    [
        ("```cobol\nx\n```", "cobol"),
        ("```\nx\n```", "''"),
        ("```sh\nfalse\n```", "exit 1"),
        ("<!-- exit: 3 -->\n```sh\nexit 3\n```\n```sh\necho a; false | cat\n```", "exit 1"),
        ("```sh\necho a\n```\n```text\nb\n```", "the page says:\nb"),
        ("```python a.py\nx = 1\n```", "a.py"),
        ("`Procfile`:\n```yaml Procfile\nweb: nothing\n```", "Procfile is otherwise"),
        ("```serve\nx\n```", "'serve'"),
        ("```python\nraise SystemExit(4)\n```", "exit 4"),
        ("```python\nx =\n```", "invalid syntax"),
        ('```json\n{"lod_interval": 1}\n```', "lod_interval"),
        ('```json\n{"events": {"a": {"n": "number"}}}\n```', "events.a.n"),
        ("```js\nprocess.exit(5)\n```", "exit 5"),
        ("```sql\nSELEC\n```", "SELEC"),
        ("```yaml\n- a: b: c\n```", "mapping values"),
        ("```ini\na\n```", "section"),
        ("```promql\nrate(datapipe_nope[5m])\n```", "datapipe_nope"),
        ("```toml\na\n```", "="),
        ("```dockerfile\nFROM a\nCPY b /\n```", "unexpected 'C'"),
    ],
)
async def test_a_block_that_does_not_hold_is_told(
    tmp_path: Path, postgres: Postgres, folder: Path, markdown: str, error: str
) -> None:
    page = ROOT / "docs" / "made-up.md"
    stage = Stage(folder, postgres.create_database(), postgres.bin)
    with pytest.raises(Exception, match=re.escape(error)):
        for block in parsed(page, tmp_path, markdown).blocks:
            await stage.run(block)


@pytest.mark.parametrize(
    "markdown", ["    indented", "<!-- not run: x -->\n\ntext", "a\n\n<!-- not run: x -->"]
)
def test_a_mark_marks_a_block(tmp_path: Path, markdown: str) -> None:
    with pytest.raises(AssertionError):
        parsed(tmp_path / "page.md", tmp_path, markdown)


def parsed(page: Path, folder: Path, markdown: str) -> Page:
    file = folder / "page.md"
    file.write_text(markdown)
    found = read(file)
    for block in found.blocks:
        block.page = page
    return found
