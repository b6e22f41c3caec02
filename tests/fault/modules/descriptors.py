"""An event module with a thread that opens and closes files all the time."""

import threading

from tests.fault.files import churn

threading.Thread(target=churn, daemon=True).start()
