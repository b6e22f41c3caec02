"""An event module that makes the service tell in two seconds, not in thirty, who is dead."""

from datapipe.mirrors.ironmq import mirror as ironmq
from datapipe.mirrors.ironmq import recovery as ironmq_recovery
from datapipe.pipeline import coordinator as housekeeping
from tests.fault.modules.patching import patch

patch(housekeeping, "BEAT_S", 0.2)
patch(housekeeping, "SILENT_S", 2.0)
patch(housekeeping, "_FIRST_PAUSE_S", 0.5)
for module in (ironmq, ironmq_recovery):
    patch(module, "LEASE_S", 2)
    patch(module, "LEASE_MAX_S", 8)
patch(ironmq.IronMQ, "recover_interval_s", 3.0)
