"""Background tasks: none of them dies unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import structlog

from datapipe.errors import ConfigError, DatapipeError
from datapipe.health import Health
from datapipe.retry import backoff

log = structlog.stdlib.get_logger("datapipe.pipeline.tasks")

Failed = Callable[[BaseException], None]  # gets the error of a task that died


def start(work: Coroutine[None, None, None], failed: Failed) -> asyncio.Task[None]:
    """Start a task; it dies if it ends with an error, or is cancelled without a request."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if (exc := task.exception()) is not None:
                failed(exc)
        elif not task.cancelling():
            failed(RuntimeError(f"cancelled without a request: {task.get_coro()}"))

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task


@asynccontextmanager
async def background(
    work: Sequence[Coroutine[None, None, None]], failed: Failed
) -> AsyncIterator[None]:
    """Tasks that live as long as the block.

    They are cancelled until they end: `asyncio.wait_for` of Python 3.11, on which aiopg waits,
    drops a cancellation that comes at the moment at which what it waits for ends
    (python/cpython issue 81839).
    """
    pending = {start(each, failed) for each in work}
    try:
        yield
    finally:
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)


async def repeat(
    step: Callable[[], Awaitable[float]],
    health: Health,
    failed: str,
    longest_s: float,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """For ever: a step, of which `health` is, then a pause of as many seconds as it returns.

    A step that raises a DatapipeError is retried with back-off, at most `longest_s`; the first of
    several failures in a row is logged as `failed`. Raises: ConfigError: no repeat mends that.
    """
    failures = 0
    while True:
        try:
            with health.trying(f"the {health.part}"):
                pause_s = await step()
            failures = 0
        except ConfigError:
            raise
        except DatapipeError as exc:
            failures += 1
            pause_s = backoff(failures, longest_s)
            if failures == 1:
                log.warning(failed, error=str(exc))
        await pause(pause_s)


@asynccontextmanager
async def ended_by_failure() -> AsyncIterator[Failed]:
    """A `failed` for tasks within the block: the first that dies ends the block.

    Raises: DatapipeError: that is what happened.
    """
    block = asyncio.current_task()
    assert block is not None
    died: list[BaseException] = []

    def failed(exc: BaseException) -> None:
        if not died:
            block.cancel()
        died.append(exc)

    try:
        yield failed
    except asyncio.CancelledError:
        if not died:
            raise
        raise DatapipeError(f"internal error: {died[0]!r}") from died[0]
