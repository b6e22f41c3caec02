"""An event module that makes each worker die with its first load."""

from typing import Any

from datapipe.pipeline.loader import Loader
from tests.fault.modules.patching import patch


async def _die(self: Loader, *args: Any) -> None:
    raise RuntimeError("this load dies on purpose")


patch(Loader, "_load", _die)
