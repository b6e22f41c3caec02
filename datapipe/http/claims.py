"""Claims: which body each idempotency key stands for, as far as this process has seen.

So the reuse of a key is told at once. What is not known here (it was another process, a restart
came between, too many came since) is found by the load, which goes by the ledger.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from datapipe.errors import EventRejected, Reason

# Of an entry: two hashes as text, a time, a tuple, its place in the table, which is not full at
# most times. Measured with tracemalloc, rounded up to what is allocated.
CLAIM_BYTES = 400

Claim = tuple[str, str]  # hash of the ingest key's scope and the idempotency key; of the body


class Claims:
    """Claims under which an append has begun; the latest of them, as many as fit.

    Args: max_bytes: of memory. window_s: how long each is remembered. clock: in seconds.
    """

    def __init__(
        self, max_bytes: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = max_bytes // CLAIM_BYTES
        self._window_s = window_s
        self._clock = clock
        self._seen: OrderedDict[str, tuple[str, float]] = OrderedDict()  # the oldest first

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
        self._seen[key] = body, self._clock()
        self._seen.move_to_end(key)
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
