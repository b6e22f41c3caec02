"""What lies beside our own journal must not keep us from what can be had."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from datapipe.events.segment import Segment
from datapipe.mirrors import open_mirror
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
