"""Threads for work that blocks, each with a connection of a driver to itself."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

_CLOSE_S = 1.0  # for work to end once its connection is shut

_C = TypeVar("_C")
_T = TypeVar("_T")


class Sessions(ABC, Generic[_C]):
    """Plain connections, each used by one thread at a time, kept for the next.

    A thread that waits for a silent server can't be cancelled; `abort` shuts its connection, which
    frees it at once. What is abstract here is the driver's; all but `shut` is called in a thread.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._idle: list[_C] = []
        self._busy: set[_C] = set()
        self._stopping = threading.Event()

    @abstractmethod
    def is_closed(self, connection: _C) -> bool:
        """Whether it is known to be of no more use."""

    @abstractmethod
    def refusal(self) -> Exception:
        """What work raises that is begun after `abort`."""

    @abstractmethod
    def roll_back(self, connection: _C) -> None:
        """After an error; it may be closed. Raises nothing."""

    @abstractmethod
    def shut(self, connection: _C) -> None:
        """End what a thread does with it, from another one. Raises nothing."""

    @abstractmethod
    def close_one(self, connection: _C) -> None:
        """Close one that nobody uses."""

    async def run(self, connect: Callable[[], _C], work: Callable[[_C], _T]) -> _T:
        """Work that begins a transaction and ends it; in a thread.

        Raises: the driver's errors; whatever `work` raises: it is rolled back, or unknown.
        """
        thread, outcome = in_thread(partial(self._run, connect, work))
        self._threads = {each for each in self._threads if each.is_alive()} | {thread}
        return await outcome

    def _run(self, connect: Callable[[], _C], work: Callable[[_C], _T]) -> _T:
        connection = self._take_idle() or connect()
        self._busy.add(connection)
        try:
            if self._stopping.is_set():
                raise self.refusal()
            return work(connection)
        except BaseException:
            self.roll_back(connection)
            raise
        finally:
            self._busy.discard(connection)
            self._idle.append(connection)

    def _take_idle(self) -> _C | None:
        with suppress(IndexError):  # threads take them at the same time
            while True:
                connection = self._idle.pop()
                if not self.is_closed(connection):
                    return connection
        return None

    def close_idle(self) -> None:
        """An error may hold for the whole session: read-only, or the address is a standby's now."""
        while (connection := self._take_idle()) is not None:
            self.close_one(connection)

    def abort(self) -> None:
        """End what is under way, and whatever is begun later."""
        self._stopping.set()
        for connection in list(self._busy):
            self.shut(connection)

    async def close(self) -> None:
        """End all of it; returns within a second or so."""
        self.abort()
        await asyncio.to_thread(self._join, time.monotonic() + _CLOSE_S)
        self.close_idle()

    def _join(self, until: float) -> None:
        for thread in list(self._threads):
            thread.join(max(0.0, until - time.monotonic()))


def in_thread(call: Callable[[], _T]) -> tuple[threading.Thread, asyncio.Future[_T]]:
    """Start the call in a thread of its own; the thread, and its outcome to await.

    A daemon: one that hangs in a connect must not hold up the exit of the process.
    """
    outcome: Future[_T] = Future()
    thread = threading.Thread(target=_run_into, args=(outcome, call), daemon=True, name="database")
    thread.start()
    return thread, asyncio.wrap_future(outcome)


def _run_into(outcome: Future[_T], call: Callable[[], _T]) -> None:
    if not outcome.set_running_or_notify_cancel():
        return
    try:
        outcome.set_result(call())
    except BaseException as exc:
        outcome.set_exception(exc)
