"""An event module: the server is told to give up a host that vanished after 3 s, not after 20 s."""

from datapipe.sinks.postgres import database
from datapipe.sinks.postgres import sink as postgres
from tests.fault.modules.patching import patch_text

for module, name in ((database, "_BEGIN"), (database, "_BEGIN_DDL"), (postgres, "_BEGIN")):
    patch_text(module, name, "tcp_keepalives_idle = 10", "tcp_keepalives_idle = 1")
    patch_text(module, name, "tcp_keepalives_interval = 3", "tcp_keepalives_interval = 1")
    patch_text(module, name, "tcp_keepalives_count = 3", "tcp_keepalives_count = 2")
    patch_text(module, name, "tcp_user_timeout = 20000", "tcp_user_timeout = 3000")
