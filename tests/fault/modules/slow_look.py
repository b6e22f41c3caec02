"""An event module that makes a look into the journal take two seconds, as a slow disk does."""

import asyncio
from typing import Any

from datapipe.mirrors.journal.mirror import Journal
from tests.fault.modules.patching import patch

_recover = Journal.recover


async def _slowly(self: Journal, *args: Any) -> Any:
    await asyncio.sleep(2.0)
    return await _recover(self, *args)


patch(Journal, "recover", _slowly)
