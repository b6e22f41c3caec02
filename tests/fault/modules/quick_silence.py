"""An event module: who is dead is told in two seconds, not in thirty; leases and looks are real."""

from datapipe.pipeline import coordinator as housekeeping
from tests.fault.modules.patching import patch

patch(housekeeping, "BEAT_S", 0.2)
patch(housekeeping, "SILENT_S", 2.0)
patch(housekeeping, "_FIRST_PAUSE_S", 0.5)
