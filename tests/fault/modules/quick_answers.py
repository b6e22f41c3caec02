"""An event module: what is asked through the pool may take a second, not twenty."""

from datapipe.sinks.postgres import connections
from tests.fault.modules.patching import patch

patch(connections, "_ANSWER_S", 1.0)
