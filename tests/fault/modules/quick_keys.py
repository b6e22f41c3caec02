"""An event module that lets go of idempotency keys at once when their time is up."""

from datapipe.pipeline import coordinator as housekeeping
from datapipe.sinks.postgres import sink
from tests.fault.modules.patching import patch

patch(housekeeping, "BEAT_S", 0.1)
patch(sink, "_BEAT_SLACK_S", 0.0)
