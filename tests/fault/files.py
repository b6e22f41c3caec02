"""Files that are opened and closed all the time.

The number of a descriptor that is closed has a new owner at once, as with threads that connect.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable


def churn(ended: Callable[[], bool] = lambda: False) -> None:
    """Open and close files, hold a few, until told to end."""
    held: deque[int] = deque()
    while not ended():
        held.append(os.open(os.devnull, os.O_RDONLY))
        if len(held) > 4:
            os.close(held.popleft())
    for descriptor in held:
        os.close(descriptor)
