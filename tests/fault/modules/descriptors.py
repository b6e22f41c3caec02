"""An event module with a thread that opens and closes a file all the time.

So the number of a descriptor that is closed has a new owner at once, as with threads that connect.
"""

import os
import threading


def _churn() -> None:
    while True:
        os.close(os.open(os.devnull, os.O_RDONLY))


threading.Thread(target=_churn, daemon=True).start()
