"""An event module: the journal takes 1.5 s before it removes what was loaded."""

import asyncio
from collections.abc import Sequence

from datapipe.mirrors.journal import Journal
from datapipe.segment import Segment

_remove = Journal.remove


async def _remove_late(self: Journal, segments: Sequence[Segment]) -> None:
    await asyncio.sleep(1.5)
    await _remove(self, segments)


Journal.remove = _remove_late  # type: ignore[method-assign]
