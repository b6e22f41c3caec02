"""An event module that makes a background task end by a cancellation that nobody asked for."""

import asyncio

from datapipe.pipeline.coordinator import Coordinator
from tests.fault.modules.patching import patch


async def _end(self: Coordinator) -> None:
    await asyncio.sleep(1.0)
    raise asyncio.CancelledError


patch(Coordinator, "_keep", _end)
