"""An event module that makes the service look for orphaned journals often."""

from datapipe.mirrors.journal.mirror import Journal
from tests.fault.modules.patching import patch

patch(Journal, "recover_interval_s", 0.2)
