"""An event module that makes the service tell in two seconds, not in thirty, who is dead."""

from datapipe import housekeeping
from datapipe.mirrors import ironmq, ironmq_recovery

housekeeping.BEAT_S = 0.2
housekeeping.SILENT_S = 2.0
housekeeping._FIRST_PAUSE_S = 0.5
ironmq.LEASE_S = ironmq_recovery.LEASE_S = 2
ironmq.LEASE_MAX_S = ironmq_recovery.LEASE_MAX_S = 8
ironmq.IronMQ.recover_interval_s = 3.0
