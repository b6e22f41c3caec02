"""An event module that makes the service look for orphaned journals often."""

from datapipe.mirrors.journal import mirror
from tests.fault.modules.patching import patch

patch(mirror, "RECOVER_INTERVAL_S", 0.2)
