"""An event module that makes `datapipe check` wait a second, not five, for a NATS server."""

from datapipe.mirrors.nats import check
from tests.fault.modules.patching import patch

patch(check, "_CONNECT_S", 1.0)
