"""Claims: which body each idempotency key stands for, as far as this process has seen.

So the reuse of a key is told at once. What is not known here (it was another process, a restart
came between, too many came since) is found by the load, which goes by the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

from datapipe.errors import EventRejected, Reason

# Of an entry: two hashes as text, a time, a tuple, its place in the table, which is not full at
# most times. Measured with tracemalloc, rounded up to what is allocated.
CLAIM_BYTES = 400
_SHARE = 16  # once there are too many, a sixteenth goes

Claim = tuple[str, str]  # hash of the ingest key's scope and the idempotency key; of the body


class Claims:
    """Claims under which an append has begun; the latest of them, about as many as fit.

    Args: max_bytes: of memory. window_s: how long each is remembered. clock: in seconds.
    """

    def __init__(
        self, max_bytes: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = max_bytes // CLAIM_BYTES
        self._window_s = window_s
        self._clock = clock
        self._seen: dict[str, tuple[str, float]] = {}  # the oldest first

    def check(self, claim: Claim) -> None:
        """Raises: EventRejected: its key stands for another body."""
        key, body = claim
        if (seen := self._seen.get(key)) is None or seen[0] == body:
            return
        if self._clock() - seen[1] <= self._window_s:
            raise EventRejected(
                Reason.KEY_REUSED,
                "Idempotency-Key: it was used with another body; send each body under a key of its "
                "own",
            )

    def enter(self, claim: Claim) -> None:
        """An append under it begins: its key stands for this body, which `check` let pass."""
        key, body = claim
        self._seen.pop(key, None)  # it goes to the end
        self._seen[key] = body, self._clock()
        if len(self._seen) > self._most:
            # some at once: to find the first of a dict takes longer with each that went before
            for oldest in list(islice(self._seen, 1 + self._most // _SHARE)):
                del self._seen[oldest]
