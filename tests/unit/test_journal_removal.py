"""A removal shares the journal's writing thread with appends, for which clients wait."""

from __future__ import annotations

import asyncio
from pathlib import Path

from datapipe.mirrors.journal.mirror import open_store
from datapipe.mirrors.store import Removal
from datapipe.settings import Settings
from tests.contract.test_mirror import segment


async def test_a_removal_is_a_few_statements_between_which_appends_have_their_turn(
    tmp_path: Path,
) -> None:
    """Each statement, as each row of `executemany`, waits for the interpreter lock anew."""
    async with open_store(Settings(data_dir=str(tmp_path))) as store:
        loaded = [segment(1) for _ in range(1000)]
        await store.append(loaded)
        used = store._own.used_bytes
        statements: list[str] = []
        store._own._write.set_trace_callback(lambda sql: statements.append(sql[:6]))
        removing = asyncio.create_task(store.remove([*map(Removal.of, loaded)]))
        await asyncio.sleep(0)
        await store.append([segment(1)])
        assert not removing.done()
        await removing
        assert statements.count("DELETE") == 4
        assert statements.index("INSERT") < 4
        assert len(statements) == 5
        await store.remove([*map(Removal.of, loaded[:3])])  # unknown ones are ignored
        assert store._own.used_bytes * 1000 == used
