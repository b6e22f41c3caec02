"""A damaged journal: what can be read of it is there again, the damaged file is kept."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.events.types import Column
from datapipe.mirrors import Mirror
from datapipe.mirrors.journal import salvage
from datapipe.mirrors.journal.mirror import open_store
from datapipe.mirrors.journal.salvage import check_journals
from datapipe.mirrors.store import Removal
from datapipe.settings import Settings
from tests.contract.test_mirror import Alone

COLUMNS = (Column("user_id", "bigint"), Column("received_at", "timestamptz"))
COUNT = 300
PAGE = 16384


def segment(number: int) -> Segment:
    """Some fit many to a page, every tenth takes several."""
    size = 40_000 if number % 10 == 0 else 900
    data = f"{number:0{size - 1}}\n".encode()
    return Segment(("install", "purchase")[number % 2], COLUMNS, data, 1)


async def read_all(mirror: Mirror) -> list[int]:
    """The numbers of all segments that a recovery brings, and their removal."""
    numbers = []
    for run in (await mirror.recover(Alone(set()))).runs:
        while run.after < run.until:
            try:
                read = await mirror.read(run, 1 << 20)
            except MirrorUnavailable as exc:
                assert "damaged" in str(exc)
                continue  # repaired: the same again
            numbers += [int(each.data[-9:]) for each in read]
            run.after = read[-1].position if read else run.until
            await mirror.remove([*map(Removal.of, read)])
    return numbers


def overwrite(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


def middle(path: Path) -> int:
    return path.stat().st_size // 2 // PAGE * PAGE


def one_byte(path: Path) -> None:
    """In a segment's data: SQLite sees nothing wrong."""
    at = path.read_bytes().rindex(b"0" * 800)
    overwrite(path, at + 100, b"7")


# what is done to the file, and how many of the segments may be gone
DAMAGES: dict[str, tuple[Callable[[Path], None], int]] = {
    "header": (lambda path: overwrite(path, 0, b"\0" * 100), 0),
    "first_page": (lambda path: overwrite(path, 0, os.urandom(PAGE)), 0),
    "middle_page": (lambda path: overwrite(path, middle(path), os.urandom(PAGE)), 20),
    "middle_pages_of_zeros": (lambda path: overwrite(path, middle(path), bytes(PAGE * 3)), 60),
    "tail_cut": (lambda path: os.truncate(path, middle(path) + PAGE + 77), 170),
    "tail_garbage": (lambda path: overwrite(path, middle(path) + PAGE, os.urandom(PAGE * 9)), 190),
    "one_byte": (one_byte, 1),
    "nothing_left": (lambda path: path.write_bytes(b"no database"), COUNT),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_can_be_read_is_there_again(damage: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path))
    async with open_store(settings) as journal:
        for number in range(COUNT):
            await journal.append([segment(number)])
    path = tmp_path / "journal" / "0.sqlite"
    hurt, may_be_gone = DAMAGES[damage]
    hurt(path)
    content = path.read_bytes()
    assert any(level == "fail" for level, _ in check_journals(settings))
    async with open_store(settings) as journal:
        found = await read_all(journal)
        assert len(found) == len(set(found)), "doubled"
        assert COUNT - len(found) <= may_be_gone, COUNT - len(found)
        (stored,) = (await journal.append([segment(0)])).stored  # and it goes on
        assert stored.position > COUNT, "a position was given out twice"
    (kept,) = path.parent.glob("*.damaged-*[0-9x]")  # its log may lie beside it
    if damage != "one_byte":  # that was noticed only when the first lane had been removed
        assert kept.read_bytes() == content
    findings = check_journals(settings)
    assert [level for level, _ in findings] == ["ok", "warn"]
    assert str(kept) in findings[1][1]


async def test_damage_while_it_is_in_use(tmp_path: Path) -> None:
    """Appends go on, reads give what is left; positions stay what they were."""
    settings = Settings(data_dir=str(tmp_path))
    path = tmp_path / "journal" / "0.sqlite"
    async with open_store(settings) as journal:
        for number in range(COUNT):
            await journal.append([segment(number)])
    async with open_store(settings) as journal:
        source = journal.traits.identity
        overwrite(path, middle(path), bytes(PAGE * 3))
        found = asyncio.create_task(read_all(journal))
        late = [segment(number) for number in range(COUNT, COUNT + 50)]
        for each in late:
            await journal.append([each])
        assert COUNT - len(await found) <= 60
        assert {each.source for each in late} == {source}
        assert len({each.position for each in late}) == 50
    async with open_store(settings) as journal:
        assert await read_all(journal) == [n for n in range(COUNT, COUNT + 50) if n % 2 == 0] + [
            n for n in range(COUNT, COUNT + 50) if n % 2
        ]


async def test_the_log_of_a_killed_process_is_read_with_its_file(tmp_path: Path) -> None:
    """What SQLite had not yet moved from its log into the damaged file is not lost either."""
    settings = Settings(data_dir=str(tmp_path / "one"))
    async with open_store(settings) as journal:
        for number in range(100):
            await journal.append([segment(number)])
        shutil.copytree(tmp_path / "one", tmp_path / "two")  # as a kill leaves it
    settings = Settings(data_dir=str(tmp_path / "two"))
    path = tmp_path / "two" / "journal" / "0.sqlite"
    assert path.with_name("0.sqlite-wal").stat().st_size > 100_000
    overwrite(path, 0, b"\0" * 100)
    async with open_store(settings) as journal:
        assert sorted(await read_all(journal)) == list(range(100))


def test_a_place_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service would refuse to start there, or refuse events."""
    (tmp_path / "file").touch()
    ((level, text),) = check_journals(Settings(data_dir=str(tmp_path / "file" / "inner")))
    assert (level, f"as {tmp_path / 'file'} can't be written" in text) == ("fail", True)
    settings = Settings(data_dir=str(tmp_path / "new" / "data"))
    assert [level for level, _ in check_journals(settings)] == ["ok"]
    full = shutil.disk_usage(tmp_path)._replace(free=63 * 1024 * 1024)
    monkeypatch.setattr(salvage.shutil, "disk_usage", lambda _: full)
    assert [level for level, _ in check_journals(settings)] == ["fail"]
