"""An event module: the server is told to give up a host that vanished after 3 s, not after 20 s."""

from datapipe.sinks import database, postgres

for module, name in ((database, "_BEGIN"), (postgres, "_BEGIN")):
    begin = getattr(module, name)
    for slow, quick in (
        ("tcp_keepalives_idle = 10", "tcp_keepalives_idle = 1"),
        ("tcp_keepalives_interval = 3", "tcp_keepalives_interval = 1"),
        ("tcp_keepalives_count = 3", "tcp_keepalives_count = 2"),
        ("tcp_user_timeout = 20000", "tcp_user_timeout = 3000"),
    ):
        assert slow in begin, f"what this changes is no longer told: {slow}"
        begin = begin.replace(slow, quick)
    setattr(module, name, begin)
