"""An event module that makes a background task die: the one that keeps house, after a second."""

import asyncio

from datapipe import housekeeping


async def _die(self: housekeeping.Housekeeper) -> None:
    await asyncio.sleep(1.0)
    raise RuntimeError("this task dies on purpose")


housekeeping.Housekeeper.keep = _die  # type: ignore[method-assign]
