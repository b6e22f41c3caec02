"""An event module: how late the service's event loop is while a load runs.

It sleeps for a millisecond, notes how long the loop took beyond that, and sleeps again, as long as
the load lasts; then it logs what it has noted, in milliseconds.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog

from datapipe.sinks.transactional import TransactionalSink
from tests.fault.modules.patching import patch

_NAP_S = 0.001

_load = TransactionalSink.load
log = structlog.stdlib.get_logger("benchmarks")


async def _load_watched(self: TransactionalSink, *args: Any, **kwargs: Any) -> Any:
    late_ms: list[float] = []
    watching = asyncio.create_task(_watch(late_ms))
    try:
        return await _load(self, *args, **kwargs)
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        log.info("event loop delays", late_ms=late_ms)


async def _watch(late_ms: list[float]) -> None:
    while True:
        due = time.perf_counter() + _NAP_S
        try:
            await asyncio.sleep(_NAP_S)
        finally:  # what the load's end cuts short counts, if it was late already
            if (late := time.perf_counter() - due) >= 0:
                late_ms.append(round(late * 1e3, 3))


patch(TransactionalSink, "load", _load_watched)
