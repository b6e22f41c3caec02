"""Background tasks: none of them dies in silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager


@asynccontextmanager
async def background(
    work: Sequence[Coroutine[None, None, None]], failed: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """Tasks that live as long as the block; one that dies is told to `failed`.

    To end by a cancellation that nobody asked for is to die, too.
    """

    def watch(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if (exc := task.exception()) is not None:
                failed(exc)
        elif not task.cancelling():
            failed(RuntimeError(f"cancelled by nobody: {task.get_coro()}"))

    tasks = [asyncio.create_task(each) for each in work]
    for task in tasks:
        task.add_done_callback(watch)
    try:
        yield
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end.

    `asyncio.wait_for` of Python 3.11, on which aiopg waits, drops a cancellation that comes at the
    moment at which what it waits for ends (python/cpython issue 81839).
    """
    pending: set[asyncio.Task[None]] = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
