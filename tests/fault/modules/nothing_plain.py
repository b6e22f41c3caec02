"""No head is plain: aiohttp serves each connection."""

from datapipe.http import heads
from tests.fault.modules.patching import patch

patch(heads, "_is_plain", lambda head, syntax: False)
