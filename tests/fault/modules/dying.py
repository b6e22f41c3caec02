"""An event module that makes a background task die: the one that keeps house, after a second."""

import asyncio

from datapipe.pipeline.coordinator import Housekeeper
from tests.fault.modules.patching import patch


async def _die(self: Housekeeper) -> None:
    await asyncio.sleep(1.0)
    raise RuntimeError("this task dies on purpose")


patch(Housekeeper, "keep", _die)
