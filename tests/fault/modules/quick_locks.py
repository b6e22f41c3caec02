"""An event module that makes a load wait for a lock 0.3 s, not 10 s."""

from datapipe.sinks.postgres import sink as postgres
from tests.fault.modules.patching import patch_text

patch_text(postgres, "_BEGIN", "lock_timeout = '10s'", "lock_timeout = '300ms'")
