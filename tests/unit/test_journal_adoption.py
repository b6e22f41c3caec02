"""What lies beside our own journal must not keep us from what can be had."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from datapipe.errors import MirrorUnavailable
from datapipe.events.segment import Segment
from datapipe.mirrors import open_mirror
from datapipe.mirrors.journal.file import JournalFile
from datapipe.mirrors.journal.mirror import open_store
from datapipe.mirrors.journal.salvage import check_journals
from datapipe.mirrors.store import Removal
from datapipe.settings import Settings
from tests.contract.test_mirror import Alone, segment


async def test_a_journal_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path), mirror="journal")
    waiting: Segment = segment(1)
    async with open_mirror(settings, "before") as mirror:
        await mirror.append([waiting])
    newer = tmp_path / "journal" / "1.sqlite"
    with sqlite3.connect(newer) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("PRAGMA user_version=99")
    connection.close()
    async with open_mirror(settings, "after") as mirror:
        for events in (1, 0):
            found = await mirror.recover(Alone(set()))
            assert sum(came.events for came in found.lanes.values()) == events
    assert newer.exists()


async def test_a_backlog_that_can_not_be_told_at_first_is_told_by_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=str(tmp_path), mirror="journal")
    async with open_mirror(settings, "before") as mirror:
        await mirror.append([segment(1)])
    told = JournalFile.inherited

    def busy(self: JournalFile) -> Any:
        monkeypatch.setattr(JournalFile, "inherited", told)
        raise sqlite3.OperationalError("database is locked")

    async with open_mirror(settings, "after") as mirror:
        monkeypatch.setattr(JournalFile, "inherited", busy)
        with pytest.raises(MirrorUnavailable):
            await mirror.recover(Alone(set()))
        found = await mirror.recover(Alone(set()))
        assert [came.events for came in found.lanes.values()] == [1]


async def test_a_journal_that_is_made_anew_while_it_expires_stays_ours(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path), mirror="journal")
    async with open_store(settings) as store:
        await store.append([segment(1)])

    class Taken(Alone):
        async def expire_source(self, source: str) -> None:
            shutil.rmtree(tmp_path / "journal")
            await store.append([segment(2)])

    async with open_store(settings) as store:
        (run,) = (await store.recover(Alone(set()))).runs
        await store.remove([*map(Removal.of, await store.read(run, 1000))])
        await store.keep(Taken(set()))
        await store.append([segment(3)])
        async with open_store(settings) as other:
            assert other._own.path != store._own.path, "two processes own one file"


async def test_a_journal_that_was_never_used_leaves_nothing_behind(tmp_path: Path) -> None:
    """As by `datapipe load` beside a service, or as another user."""
    settings = Settings(data_dir=str(tmp_path))
    async with open_store(settings):
        pass
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["0.lock"]
    ((level, text),) = check_journals(settings)
    assert (level, text.startswith("journal: none yet in")) == ("ok", True)
