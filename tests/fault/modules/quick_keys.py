"""An event module that lets go of idempotency keys at once when their time is up."""

from datapipe.pipeline import coordinator as housekeeping
from datapipe.sinks import sql_ledger
from tests.fault.modules.patching import patch

patch(housekeeping, "BEAT_S", 0.1)
patch(sql_ledger, "_BEAT_SLACK_S", 0.0)
patch(sql_ledger, "RENEWED_S", 0.0)
