"""An event module that makes a background task end by a cancellation that nobody asked for."""

import asyncio

from datapipe.pipeline.coordinator import Housekeeper
from tests.fault.modules.patching import patch


async def _end(self: Housekeeper) -> None:
    await asyncio.sleep(1.0)
    raise asyncio.CancelledError


patch(Housekeeper, "keep", _end)
