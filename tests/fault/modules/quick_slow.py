"""An event module: what takes longer than 1 s is slow, not what takes longer than 10 s."""

from datapipe import health
from datapipe.pipeline import loader
from tests.fault.modules.patching import patch

for module in (health, loader):
    patch(module, "SLOW_S", 1.0)
