"""Work in daemon threads: one that hangs in a connect must not hold up the exit of the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def in_thread(call: Callable[[], _T]) -> tuple[threading.Thread, asyncio.Future[_T]]:
    """Start the call in a thread of its own; the thread, and its outcome to await."""
    outcome: Future[_T] = Future()
    thread = threading.Thread(target=_run_into, args=(outcome, call), daemon=True, name="database")
    thread.start()
    return thread, asyncio.wrap_future(outcome)


def _run_into(outcome: Future[_T], call: Callable[[], _T]) -> None:
    if not outcome.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as exc:
        outcome.set_exception(exc)
    else:
        outcome.set_result(result)
