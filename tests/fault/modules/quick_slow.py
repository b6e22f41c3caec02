"""An event module: a load is slow after 1 s, not after 10 s."""

from datapipe.pipeline import loader, schedule
from tests.fault.modules.patching import patch

for module in (loader, schedule):
    patch(module, "SLOW_S", 1.0)
