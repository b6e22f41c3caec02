"""Health: whether a part works, by the outcome of its last real work; never by a probe."""

from __future__ import annotations

import time


class Health:
    """One part, such as the database or the mirror.

    Work overlaps: what began before the part failed says nothing of how it is since, and neither
    does a failure of what began before it last worked. So each outcome names when its work began
    (`time.perf_counter`), and one that is overtaken is ignored.

    Attributes:
        up: None until the first real work has ended.
        error: of the last failure, while it is down.
    """

    def __init__(self, *, up: bool | None = None) -> None:
        self.up = up
        self.error: str | None = None
        self._worked_at = self._failed_at = 0.0

    def works(self, began: float) -> bool:
        """Work that began then has succeeded; whether the part was not up before."""
        if began < self._failed_at:
            return False
        came_up = not self.up
        self.up, self.error, self._worked_at = True, None, time.perf_counter()
        return came_up

    def fails(self, began: float, error: str) -> bool:
        """Work that began then has failed, and the part is why; whether it was not down before."""
        if began < self._worked_at:
            return False
        went_down = self.up is not False
        self.up, self.error, self._failed_at = False, error, time.perf_counter()
        return went_down
