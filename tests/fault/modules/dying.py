"""An event module that makes a background task die: one of the coordinator's, after a second."""

import asyncio

from datapipe.pipeline.coordinator import Coordinator
from tests.fault.modules.patching import patch


async def _die(self: Coordinator) -> None:
    await asyncio.sleep(1.0)
    raise RuntimeError("this task dies on purpose")


patch(Coordinator, "_keep", _die)
