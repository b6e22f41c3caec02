"""An event module that makes the service tell in two seconds, not in thirty, who is dead."""

from datapipe.mirrors.ironmq import books, orphans, upkeep
from datapipe.mirrors.ironmq import mirror as ironmq
from datapipe.pipeline import coordinator
from tests.fault.modules.patching import patch

patch(coordinator, "BEAT_S", 0.2)
patch(coordinator, "SILENT_S", 2.0)
patch(coordinator, "_FIRST_PAUSE_S", 0.5)
for module in (books, orphans):
    patch(module, "LEASE_S", 2)
for module in (upkeep, orphans):
    patch(module, "LEASE_MAX_S", 8)
patch(ironmq, "RECOVER_INTERVAL_S", 3.0)
