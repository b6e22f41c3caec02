"""An event module: what a process takes from NATS it must load within 3 s, not within 5 minutes."""

from datapipe.mirrors.nats import mirror
from tests.fault.modules.patching import patch

patch(mirror, "FENCE_S", 3.0)
