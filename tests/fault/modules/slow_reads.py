"""An event module: the journal takes 0.6 s to give what it has read."""

import asyncio
from typing import Any

from datapipe.mirrors.journal.mirror import Journal
from tests.fault.modules.patching import patch

_read = Journal.read


async def _read_late(self: Journal, *args: Any) -> Any:
    segments = await _read(self, *args)
    await asyncio.sleep(0.6)
    return segments


patch(Journal, "read", _read_late)
