"""An event module: the journal takes 1.5 s before it removes what was loaded."""

import asyncio
from typing import Any

from datapipe.mirrors.journal.mirror import Journal
from tests.fault.modules.patching import patch

_remove = Journal.remove


async def _remove_late(self: Journal, *args: Any) -> None:
    await asyncio.sleep(1.5)
    await _remove(self, *args)


patch(Journal, "remove", _remove_late)
