"""An event module that lets go of idempotency keys at once when their time is up."""

from datapipe.pipeline import coordinator as housekeeping
from datapipe.sinks import sql
from tests.fault.modules.patching import patch

patch(housekeeping, "BEAT_S", 0.1)
patch(sql, "_BEAT_SLACK_S", 0.0)
patch(sql, "RENEWED_S", 0.0)
