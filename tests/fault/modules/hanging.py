"""An event module: the mirror neither appends events of a lane nor says no while a file
`hang-<lane>` lies in the folder in which the service was started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datapipe.events.segment import Segment
from datapipe.mirrors.ironmq.mirror import IronMQ
from datapipe.mirrors.journal.mirror import Journal
from tests.fault.modules.patching import patch


def _while_it_lies_there(mirror: Any) -> None:
    append = mirror.append

    async def hanging(self: object, segments: Sequence[Segment]) -> Sequence[Segment]:
        while any(Path(f"hang-{segment.lane}").exists() for segment in segments):
            await asyncio.sleep(0.01)
        stored: Sequence[Segment] = await append(self, segments)
        return stored

    patch(mirror, "append", hanging)


_while_it_lies_there(Journal)
_while_it_lies_there(IronMQ)
