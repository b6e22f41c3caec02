"""An event module that makes a background task end by a cancellation that nobody asked for."""

import asyncio

from datapipe import housekeeping


async def _end(self: housekeeping.Housekeeper) -> None:
    await asyncio.sleep(1.0)
    raise asyncio.CancelledError


housekeeping.Housekeeper.keep = _end  # type: ignore[method-assign]
