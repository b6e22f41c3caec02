"""Guard: a table that refuses too much is taken to be wrong, not its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from datapipe.errors import LaneBlocked
from datapipe.sinks.transaction import RefusedRow

GUARD_ROWS = 100  # so many refused rows, and more than half of all


class Guard:
    """Whether the table of a lane is to be taken to be wrong, by what it refused of the last loads.

    They are remembered as long as the process lives. It goes by the fewest of them, back from the
    one in hand, in which enough was refused: so good times long ago excuse nothing.
    """

    def __init__(self) -> None:
        # (refused, rows) of loads with refused rows; clean ones are added to the rows before them
        self._last: deque[tuple[int, int]] = deque()
        self._in_hand = (0, 0)
        self._afresh = False

    def look(self, refused: Sequence[RefusedRow], rows: int, accept_dead: bool) -> None:
        """Look at a load that is about to commit, of so many rows.

        Raises: LaneBlocked: so much is refused that the table is taken to be wrong.
        """
        telling = [each for each in refused if not each.of_itself]
        self._in_hand = len(telling), rows - (len(refused) - len(telling))
        self._afresh |= accept_dead
        if not telling or accept_dead:
            return
        count, of = self._in_hand
        for before in reversed(self._last):
            if count >= GUARD_ROWS:
                break
            count, of = count + before[0], of + before[1]
        if count < GUARD_ROWS or count * 2 <= of:
            return
        self._afresh = True
        raise LaneBlocked(
            f"the table refuses {count} of {of} rows: {telling[0].message} (SQLSTATE "
            f"{telling[0].sqlstate}); repair the table, or let them through with "
            "POST /load?accept=dead"
        )

    def committed(self) -> None:
        """The load has committed; once somebody has acted on a block, counting starts afresh."""
        refused, rows = self._in_hand
        if self._afresh:
            self._last.clear()
            self._afresh = False
        elif refused:
            self._last.append((refused, rows))
            while sum(count for count, _ in self._last) - self._last[0][0] >= GUARD_ROWS:
                self._last.popleft()
        elif self._last:
            count, of = self._last[-1]
            self._last[-1] = (count, of + rows)
