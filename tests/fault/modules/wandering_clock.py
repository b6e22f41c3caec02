"""An event module whose service believes in another day at each POST, from six days ago to in six
days, and looks after its tables all the time.
"""

import random
from datetime import UTC, datetime, timedelta

from datapipe.http import ingest
from datapipe.pipeline import coordinator
from tests.fault.modules.patching import patch


def _wandering(_: object) -> str:
    return f"{datetime.now(UTC) + timedelta(days=random.randint(-6, 6)):%Y-%m-%d %H:%M:%S}"


patch(ingest._Clock, "now", _wandering)
patch(coordinator, "_TABLES_S", 0.1)
