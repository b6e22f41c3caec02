"""An event loop whose clock jumps to the next timer as soon as nothing is left to do.

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(main())  # asyncio.sleep(3600) takes no time

Sockets are real: time stands still while something comes in on them. What is given to a thread is
done at once, and takes no time either.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

_QUIET = 1  # looks of a millisecond at the sockets, before time goes on after they were busy


class _Selector(selectors.DefaultSelector):
    """Skips what it would have waited."""

    skipped_s = 0.0
    _quiet = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        wait_s: float | None = 0.0
        if timeout is None:
            wait_s = None
        elif timeout > 0 and self._quiet < _QUIET:
            self._quiet += 1
            wait_s = 0.001
        events = super().select(wait_s)
        if events:
            self._quiet = 0
        elif timeout is not None and timeout > 0 and self._quiet == _QUIET:
            self.skipped_s += timeout
        return events


class VirtualTime(asyncio.SelectorEventLoop):
    """Its clock is the real one, plus all that was skipped."""

    def __init__(self) -> None:
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return super().time() + self._skipping.skipped_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as exc:
            done.set_exception(exc)
        return done
