"""An event module: NATS gives to others what nobody has acknowledged for 3 s, not for 30."""

from datapipe.mirrors.nats import hand, pull, streams
from tests.fault.modules.patching import patch

ACK_WAIT_S = 3.0

for module in (hand, pull, streams):
    patch(module, "ACK_WAIT_S", ACK_WAIT_S)
patch(pull, "_STALE_S", ACK_WAIT_S / 2)
