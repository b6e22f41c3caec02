"""Guard: where a table refuses too much, the table is taken to be wrong, not its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from datapipe.errors import LaneBlocked
from datapipe.sinks.transaction import RefusedRow

GUARD_ROWS = 100  # so many refused rows, and more than half of all


class Guard:
    """Decides whether the table of a lane is wrong, by how much of the last loads it refused.

    They are remembered as long as the process lives. Only the latest of them count, back to where
    `GUARD_ROWS` were refused: so clean loads long ago excuse nothing.
    """

    def __init__(self) -> None:
        # (refused, rows) of loads with refused rows; clean ones are added to the rows before them
        self._last: deque[tuple[int, int]] = deque()
        self._current = (0, 0)
        self._reset = False
        self._blocked = False

    def look(self, refused: Sequence[RefusedRow], rows: int, accept_dead: bool) -> None:
        """Examine a load that is about to commit, of so many rows.

        Raises: LaneBlocked: so much is refused that the table is taken to be wrong.
        """
        counted = [each for each in refused if not each.of_itself]
        self._current = len(counted), rows - (len(refused) - len(counted))
        self._reset |= accept_dead
        if not counted or accept_dead:
            return
        count, of = self._current
        for before in reversed(self._last):
            if count >= GUARD_ROWS:
                break
            count, of = count + before[0], of + before[1]
        # once it is taken to be wrong, the next load need not show that anew: it may be a small one
        if (count < GUARD_ROWS and not self._blocked) or count * 2 <= of:
            return
        self._reset = self._blocked = True
        raise LaneBlocked(
            f"the table refuses {count} of {of} rows: {counted[0].message} (SQLSTATE "
            f"{counted[0].sqlstate}); repair the table, or let them through with "
            "POST /load?accept=dead"
        )

    def committed(self) -> None:
        """The load has committed; after a block was resolved, counting starts anew."""
        refused, rows = self._current
        self._blocked = False
        if self._reset:
            self._last.clear()
            self._reset = False
        elif refused:
            self._last.append((refused, rows))
            while sum(count for count, _ in self._last) - self._last[0][0] >= GUARD_ROWS:
                self._last.popleft()
        elif self._last:
            count, of = self._last[-1]
            self._last[-1] = (count, of + rows)
