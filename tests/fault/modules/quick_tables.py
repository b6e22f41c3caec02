"""An event module that makes the service look after its tables all the time."""

from datapipe.pipeline import coordinator
from tests.fault.modules.patching import patch

patch(coordinator, "_TABLES_S", 0.2)
